// Several rows side by side, value i of row t at v[i * B + t]: what is done to all rows alike is done to whole vectors.
#pragma once
#include "core.h"

namespace slip {
namespace {

template <size_t B>
struct RowsOf;
template <>
struct RowsOf<1> {
    typedef float Type;
};
template <>
struct RowsOf<4> {
    typedef float Type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct RowsOf<8> {
    typedef float Type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct RowsOf<16> {
    typedef float Type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <size_t B>
using Across = typename RowsOf<B>::Type;  // one value of each of B rows

typedef int32_t FourIndices __attribute__((vector_size(16)));

template <int... I>
inline Across<4> pick(Across<4> a, Across<4> b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, FourIndices{I...});
#endif
}

// Four rows of four values, `step` apart, become the columns of `to`.
inline void transpose(const float* from, size_t step, float* to, size_t to_step) {
    Across<4> x[4], y[4];
    for (size_t i = 0; i < 4; i++) x[i] = *reinterpret_cast<const Across<4>*>(from + i * step);
    for (size_t i = 0; i < 2; i++) {
        y[2 * i] = pick<0, 4, 1, 5>(x[i], x[i + 2]);
        y[2 * i + 1] = pick<2, 6, 3, 7>(x[i], x[i + 2]);
    }
    for (size_t i = 0; i < 2; i++) {
        *reinterpret_cast<Across<4>*>(to + 2 * i * to_step) = pick<0, 4, 1, 5>(y[i], y[i + 2]);
        *reinterpret_cast<Across<4>*>(to + (2 * i + 1) * to_step) = pick<2, 6, 3, 7>(y[i], y[i + 2]);
    }
}

// n values of each of B rows, `step` apart, side by side in v.
template <size_t B>
inline void join(const float* rows, size_t step, size_t n, float* v) {
    const size_t whole = B == 1 ? 0 : n / 4 * 4;
    for (size_t i = 0; i < whole; i += 4)
        for (size_t t = 0; t < B; t += 4) transpose(rows + t * step + i, step, v + i * B + t, B);
    for (size_t i = whole; i < n; i++)
        for (size_t t = 0; t < B; t++) v[i * B + t] = rows[t * step + i];
}

// And back.
template <size_t B>
inline void part(const float* v, size_t n, float* rows, size_t step) {
    const size_t whole = B == 1 ? 0 : n / 4 * 4;
    for (size_t i = 0; i < whole; i += 4)
        for (size_t t = 0; t < B; t += 4) transpose(v + i * B + t, B, rows + t * step + i, step);
    for (size_t i = whole; i < n; i++)
        for (size_t t = 0; t < B; t++) rows[t * step + i] = v[i * B + t];
}

}  // namespace
}  // namespace slip
