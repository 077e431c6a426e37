// The secret change of basis: rounds of a permutation, rotations of planes and a Walsh-Hadamard transform.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_rows.h"

namespace slip {
namespace {

// Neighbours that fill one register: shuffles of wider vectors would be taken apart, value by value.
#if defined(__AVX512F__)
#define SLIP_LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
constexpr size_t kLanes = 16;
#elif defined(__AVX__)
#define SLIP_LANES 0, 1, 2, 3, 4, 5, 6, 7
constexpr size_t kLanes = 8;
#else
#define SLIP_LANES 0, 1, 2, 3
constexpr size_t kLanes = 4;
#endif
using Lanes = Across<kLanes>;
typedef int32_t LaneIndices __attribute__((vector_size(4 * kLanes)));

// One level of the transform within a register: sums and differences of values `H` apart.
template <int H, int... I>
inline Lanes level(Lanes x) {
#if defined(__clang__)
    const Lanes partner = __builtin_shufflevector(x, x, (I ^ H)...);
#else
    const Lanes partner = __builtin_shuffle(x, LaneIndices{(I ^ H)...});
#endif
    return partner + x * Lanes{(I & H ? -1.0f : 1.0f)...};
}

// log2(R) levels in one pass over `count` vectors: sums and differences of vectors h, 2h, ... R/2 h apart, `scale` times.
template <size_t R, size_t B>
inline void levels(Across<B>* all, size_t count, size_t h, float scale = 1) {
    for (size_t begin = 0; begin < count; begin += R * h)
        for (Across<B>* a = all + begin; a < all + begin + h; a++) {
            Across<B> x[R];
#pragma GCC unroll 8
            for (size_t i = 0; i < R; i++) x[i] = a[i * h] * scale;
#pragma GCC unroll 4
            for (size_t step = 1; step < R; step *= 2)
#pragma GCC unroll 8
                for (size_t i = 0; i < R; i++)
                    if (!(i & step)) {
                        const Across<B> sum = x[i] + x[i + step];
                        x[i + step] = x[i] - x[i + step];
                        x[i] = sum;
                    }
#pragma GCC unroll 8
            for (size_t i = 0; i < R; i++) a[i * h] = x[i];
        }
}

// Orthonormal Walsh-Hadamard transform of one block of B rows, in place; size is a power of two. Scaled first and then
// level by level, from neighbours outwards: a row's result does not depend on the rows beside it.
template <size_t B>
inline void transform(Across<B>* v, size_t size) {
    float scale = float(1 / std::sqrt(double(size)));
    size_t h = 1;
    for (; 8 * h <= size; h *= 8, scale = 1) levels<8, B>(v, size, h, scale);
    if (4 * h <= size)
        levels<4, B>(v, size, h, scale);
    else if (2 * h <= size)
        levels<2, B>(v, size, h, scale);
}

template <>
inline void transform<1>(float* v, size_t size) {
    const float scale = float(1 / std::sqrt(double(size)));
    if (size < kLanes) {
        for (size_t i = 0; i < size; i++) v[i] *= scale;
        for (size_t h = 1; h < size; h *= 2)
            for (size_t i = 0; i < size; i++)
                if (!(i & h)) {
                    const float sum = v[i] + v[i + h];
                    v[i + h] = v[i] - v[i + h];
                    v[i] = sum;
                }
        return;
    }
    Lanes* const all = reinterpret_cast<Lanes*>(v);
    const size_t count = size / kLanes;
    for (size_t i = 0; i < count; i++) {
        Lanes x = level<2, SLIP_LANES>(level<1, SLIP_LANES>(all[i] * scale));
        if constexpr (kLanes > 4) x = level<4, SLIP_LANES>(x);
        if constexpr (kLanes > 8) x = level<8, SLIP_LANES>(x);
        all[i] = x;
    }
    size_t h = 1;
    for (; 8 * h <= count; h *= 8) levels<8, kLanes>(all, count, h);
    if (4 * h <= count)
        levels<4, kLanes>(all, count, h);
    else if (2 * h <= count)
        levels<2, kLanes>(all, count, h);
}

// Blocks of 512, then the binary digits of what is left, largest first.
template <size_t B>
inline void hadamard(Across<B>* v, size_t n) {
    for (size_t size = 512; n; size /= 2)
        for (; n >= size; n -= size, v += size) transform<B>(v, size);
}

// One round: to[i] = H G from[perm[i]], G turning the planes (i, i + n/2). `from` and `to` do not overlap.
template <size_t B>
inline void forward_round(const Across<B>* __restrict from, const int32_t* perm, const float* turns, size_t n,
                          Across<B>* __restrict to) {
    const size_t half = n / 2;
    const float *cos = turns, *sin = turns + half;
    for (size_t i = 0; i < half; i++) {
        const Across<B> a = from[perm[i]], b = from[perm[half + i]];
        to[i] = cos[i] * a - sin[i] * b;
        to[half + i] = sin[i] * a + cos[i] * b;
    }
    if (n % 2) to[n - 1] = from[perm[n - 1]];
    hadamard<B>(to, n);
}

// Its inverse: to[perm[i]] = G' H from[i]. `from` is spoiled.
template <size_t B>
inline void backward_round(Across<B>* __restrict from, const int32_t* perm, const float* turns, size_t n,
                           Across<B>* __restrict to) {
    const size_t half = n / 2;
    const float *cos = turns, *sin = turns + half;
    hadamard<B>(from, n);
    for (size_t i = 0; i < half; i++) {
        const Across<B> a = from[i], b = from[half + i];
        to[perm[i]] = cos[i] * a + sin[i] * b;
        to[perm[half + i]] = cos[i] * b - sin[i] * a;
    }
    if (n % 2) to[perm[n - 1]] = from[n - 1];
}

// All rounds, of B rows side by side: from v through w back to v.
template <size_t B>
inline void blind(const Blinding& by, size_t n, Across<B>* v, Across<B>* w) {
    static_assert(Blinding::kRounds == 4, "from v to w and back, twice");
    const size_t step = n / 2 * 2;
    forward_round<B>(v, by.perm, by.turns, n, w);
    for (size_t i = 0; i < n; i++) w[i] *= by.diagonal[i];
    forward_round<B>(w, by.perm + n, by.turns + step, n, v);
    forward_round<B>(v, by.perm + 2 * n, by.turns + 2 * step, n, w);
    forward_round<B>(w, by.perm + 3 * n, by.turns + 3 * step, n, v);
}

template <size_t B>
inline void unblind(const Blinding& by, size_t n, Across<B>* v, Across<B>* w) {
    const size_t step = n / 2 * 2;
    backward_round<B>(v, by.perm + 3 * n, by.turns + 3 * step, n, w);
    backward_round<B>(w, by.perm + 2 * n, by.turns + 2 * step, n, v);
    backward_round<B>(v, by.perm + n, by.turns + step, n, w);
    for (size_t i = 0; i < n; i++) w[i] *= 1 / by.diagonal[i];
    backward_round<B>(w, by.perm, by.turns, n, v);
}

}  // namespace
}  // namespace slip
