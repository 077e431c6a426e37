// The secret change of basis: rounds of a permutation, rotations of planes and a Walsh-Hadamard transform.
#pragma once
#include <cmath>

#include "core.h"

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
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
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

// log2(R) levels in one pass over `count` registers: sums and differences of registers h, 2h, ... R/2 h apart.
template <size_t R>
inline void levels(Lanes* all, size_t count, size_t h) {
    for (size_t begin = 0; begin < count; begin += R * h)
        for (Lanes* a = all + begin; a < all + begin + h; a++) {
            Lanes x[R];
#pragma GCC unroll 8
            for (size_t i = 0; i < R; i++) x[i] = a[i * h];
#pragma GCC unroll 4
            for (size_t step = 1; step < R; step *= 2)
#pragma GCC unroll 8
                for (size_t i = 0; i < R; i++)
                    if (!(i & step)) {
                        const Lanes sum = x[i] + x[i + step];
                        x[i + step] = x[i] - x[i + step];
                        x[i] = sum;
                    }
#pragma GCC unroll 8
            for (size_t i = 0; i < R; i++) a[i * h] = x[i];
        }
}

// Orthonormal Walsh-Hadamard transform of one block, in place; size is a power of two.
inline void transform(float* v, size_t size) {
    const float scale = float(1 / std::sqrt(double(size)));
    if (size < kLanes) {
        for (size_t h = 1; h < size; h *= 2)
            for (size_t i = 0; i < size; i++)
                if (!(i & h)) {
                    const float sum = v[i] + v[i + h];
                    v[i + h] = v[i] - v[i + h];
                    v[i] = sum;
                }
        for (size_t i = 0; i < size; i++) v[i] *= scale;
        return;
    }
    Lanes* const all = reinterpret_cast<Lanes*>(v);
    const size_t count = size / kLanes;
    for (size_t i = 0; i < count; i++) {
        Lanes x = level<2, SLIP_LANES>(level<1, SLIP_LANES>(all[i]));
        if constexpr (kLanes > 4) x = level<4, SLIP_LANES>(x);
        if constexpr (kLanes > 8) x = level<8, SLIP_LANES>(x);
        all[i] = x * scale;
    }
    size_t h = 1;
    for (; 8 * h <= count; h *= 8) levels<8>(all, count, h);
    if (4 * h <= count) levels<4>(all, count, h), h *= 4;
    if (2 * h <= count) levels<2>(all, count, h);
}

// Blocks of 512, then the binary digits of what is left, largest first.
inline void hadamard(float* v, size_t n) {
    for (size_t size = 512; n; size /= 2)
        for (; n >= size; n -= size, v += size) transform(v, size);
}

// One round: to[i] = H G from[perm[i]], G turning the planes (i, i + n/2). `from` and `to` do not overlap.
inline void forward_round(const float* __restrict from, const int32_t* perm, const float* turns, size_t n,
                          float* __restrict to) {
    const size_t half = n / 2;
    const float *cos = turns, *sin = turns + half;
    for (size_t i = 0; i < n; i++) to[i] = from[perm[i]];
    for (size_t i = 0; i < half; i++) {
        const float a = to[i], b = to[half + i];
        to[i] = cos[i] * a - sin[i] * b;
        to[half + i] = sin[i] * a + cos[i] * b;
    }
    hadamard(to, n);
}

// Its inverse, but for the permutation; in place.
inline void backward_round(float* v, const float* turns, size_t n) {
    const size_t half = n / 2;
    const float *cos = turns, *sin = turns + half;
    hadamard(v, n);
    for (size_t i = 0; i < half; i++) {
        const float a = v[i], b = v[half + i];
        v[i] = cos[i] * a + sin[i] * b;
        v[half + i] = cos[i] * b - sin[i] * a;
    }
}

}  // namespace
}  // namespace slip
