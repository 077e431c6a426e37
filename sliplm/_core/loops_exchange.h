// The trusted arithmetic of an exchange: encoding and masking, the check, unmasking and decoding.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_blinding.h"

namespace slip {
namespace {

uint32_t low_bits(const uint32_t* words, size_t n, uint32_t* out) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        out[i] = words[i] & P;
        most = out[i] > most ? out[i] : most;
    }
    return most;
}

bool canonical(const uint32_t* x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= x[i] >= P;
    return !bad;
}

typedef uint64_t Wide __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// The products of the lower halves.
inline Wide products(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    return (Wide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// A running sum of products: their lower and their upper 32 bits apart, so that 2^32 products cannot overflow.
struct Dot {
    Wide low = {}, high = {};
};

// Factors are below 2^31, and four of their products make less than 2^64. (In an answer that is not canonical they may
// wrap around; it is refused anyway.)
inline void add(Dot& sum, const uint32_t* u, const uint32_t* y, size_t n) {
    Wide low = sum.low, high = sum.high;
    size_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const Wide a = *reinterpret_cast<const Wide*>(u + i), b = *reinterpret_cast<const Wide*>(u + i + kLanes);
        const Wide c = *reinterpret_cast<const Wide*>(y + i), d = *reinterpret_cast<const Wide*>(y + i + kLanes);
        const Wide four = products(a, c) + products(a >> 32, c >> 32) + products(b, d) + products(b >> 32, d >> 32);
        low += four & 0xFFFFFFFF;
        high += four >> 32;
    }
    for (; i < n; i++) {
        const uint64_t one = uint64_t(u[i]) * y[i];
        low[0] += one & 0xFFFFFFFF;
        high[0] += one >> 32;
    }
    sum = {low, high};
}

inline uint32_t value(const Dot& sum) {
    uint64_t total = 0;
    for (size_t l = 0; l < kLanes / 2; l++) total += sum.low[l] % P + 2 * (sum.high[l] % P);  // 2^32 = 2 mod p
    return uint32_t(total % P);
}

uint32_t dot(const uint32_t* u, const uint32_t* y, size_t n) {
    Dot sum;
    add(sum, u, y, n);
    return value(sum);
}

void project(uint32_t u, const int8_t* q, size_t n, int64_t* acc) {
    const int32_t factor = int32_t(u);
    for (size_t k = 0; k < n; k++) acc[k] += int64_t(factor) * int32_t(q[k]);
}

constexpr size_t kColumns = 256;  // at once: what a few rows have of them stays in the first cache

// The squared lengths of B rows, in double precision.
template <size_t B>
inline void squared_lengths(const Across<B>* v, size_t n, double* squares) {
    const float* x = reinterpret_cast<const float*>(v);
    double part[8][B] = {};  // summed as in `squared_length`
    const size_t even = n & ~size_t(7);
    for (size_t i = 0; i < even; i += 8)
        for (size_t k = 0; k < 8; k++)
            for (size_t t = 0; t < B; t++) part[k][t] += double(x[(i + k) * B + t]) * x[(i + k) * B + t];
    for (size_t i = even; i < n; i++)
        for (size_t t = 0; t < B; t++) part[0][t] += double(x[i * B + t]) * x[i * B + t];
    for (size_t t = 0; t < B; t++) {
        squares[t] = 0;
        for (size_t k = 0; k < 8; k++) squares[t] += part[k][t];
    }
}

// The power of two that brings x to a size that float32 has room for; 0 if x is not finite.
inline double size_of(const float* x, size_t n) {
    uint32_t peak = 0;  // of the magnitudes' bits, which are in the magnitudes' order; NaNs are above infinity
    for (size_t i = 0; i < n; i++) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7FFFFFFF;
        peak = magnitude > peak ? magnitude : peak;
    }
    if (peak >= 0x7F800000) return 0;
    return peak ? std::ldexp(1.0, -std::ilogb(__builtin_bit_cast(float, peak))) : 1;
}

inline void scale(const float* __restrict x, size_t n, double size, float* __restrict out) {
    for (size_t i = 0; i < n; i++) out[i] = float(x[i] * size);
}

// round(c v), |c v| < p / 2, as field elements.
inline void round_to_field(const float* __restrict v, size_t n, double c, uint32_t* __restrict out) {
    for (size_t i = 0; i < n; i++) {
        const int32_t value = int32_t(std::rint(v[i] * c));
        out[i] = uint32_t(value < 0 ? value + int32_t(P) : value);
    }
}

inline void mask(const uint32_t* __restrict x, const uint32_t* __restrict r, size_t n, uint32_t* __restrict out) {
    for (size_t i = 0; i < n; i++) {
        const uint32_t sum = x[i] + r[i];
        out[i] = sum >= P ? sum - P : sum;
    }
}

// float32 is enough in here, once x is of a size that it has room for: its rounding is a hundredth of what fixed point
// costs anyway. B rows, `scratch` being 2 B n floats.
template <size_t B>
bool encode_rows(const float* x, const uint32_t* r, size_t n, double length, const Blinding& blinding,
                 const Checks& checks, float* scratch, uint32_t* masked, double* inv_c, uint32_t* expected) {
    Across<B>*const v = reinterpret_cast<Across<B>*>(scratch), *const w = v + n;
    alignas(64) float tile[B * kColumns];
    double size[B], c[B];
    for (size_t t = 0; t < B; t++)
        if (!(size[t] = size_of(x + t * n, n))) return false;
    for (size_t i = 0; i < n; i += kColumns) {
        const size_t count = n - i < kColumns ? n - i : kColumns;
        for (size_t t = 0; t < B; t++) scale(x + t * n + i, count, size[t], tile + t * kColumns);
        join<B>(tile, kColumns, count, scratch + i * B);
    }
    if (blinding.perm) blind<B>(blinding, n, v, w);
    squared_lengths<B>(v, n, c);
    for (size_t t = 0; t < B; t++) {
        c[t] = c[t] > 0 ? length / std::sqrt(c[t]) : 1;
        inv_c[t] = 1 / (c[t] * size[t]);
    }
    Dot sums[B][kMaxChecks];
    for (size_t i = 0; i < n; i += kColumns) {
        const size_t count = n - i < kColumns ? n - i : kColumns;
        part<B>(scratch + i * B, count, tile, kColumns);
        for (size_t t = 0; t < B; t++) {
            alignas(64) uint32_t encoded[kColumns];
            round_to_field(tile + t * kColumns, count, c[t], encoded);
            for (size_t j = 0; j < checks.count; j++) add(sums[t][j], checks.vectors + j * n + i, encoded, count);
            mask(encoded, r + t * n + i, count, masked + t * n + i);
        }
    }
    for (size_t t = 0; t < B; t++)
        for (size_t j = 0; j < checks.count; j++) expected[t * checks.count + j] = value(sums[t][j]);
    return true;
}

// z = answer - image mod p, both below p; whether they are not.
inline uint32_t unmask(const uint32_t* __restrict answer, const uint32_t* __restrict image, size_t n,
                       uint32_t* __restrict z) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        bad |= uint32_t(answer[i] >= P) | uint32_t(image[i] >= P);
        const uint32_t difference = answer[i] - image[i];  // wraps where answer < image, and adding p wraps it back
        z[i] = difference < difference + P ? difference : difference + P;
    }
    return bad;
}

// out = inv_c times the sum over planes of scales (planes, kColumns) * centre(z (planes, kColumns)), rounded once.
inline void combine_planes(const uint32_t* __restrict z, const double* __restrict scales, size_t planes, size_t n,
                           double inv_c, float* __restrict out) {
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (size_t j = 0; j < planes; j++) {
            const uint32_t value = z[j * kColumns + i];
            const int32_t centred = (int32_t(value << 1) >> 1) + int32_t(value >> 30);  // less p from 2^30 = p/2 on
            sum += scales[j * kColumns + i] * centred;
        }
        out[i] = float(sum * inv_c);
    }
}

// Added to `out`; false if anything is wrong.
template <size_t B>
bool decode_rows(const uint32_t* answer, const uint32_t* image, const float* scales, size_t planes, size_t n,
                 const double* inv_c, const Blinding& blinding, const Checks& checks, const uint32_t* expected,
                 float* scratch, float* out) {
    Across<B>*const v = reinterpret_cast<Across<B>*>(scratch), *const w = v + n;
    alignas(64) float tile[B * kColumns];
    Dot sums[B][kMaxChecks];
    const size_t rows = planes * n;
    uint32_t wrong = 0;
    for (size_t i = 0; i < n; i += kColumns) {
        const size_t count = n - i < kColumns ? n - i : kColumns;
        alignas(64) double factors[kMaxPlanes * kColumns];
        for (size_t j = 0; j < planes; j++)
            for (size_t k = 0; k < count; k++) factors[j * kColumns + k] = scales[j * n + i + k];
        for (size_t t = 0; t < B; t++) {
            alignas(64) uint32_t z[kMaxPlanes * kColumns];
            for (size_t j = 0; j < planes; j++) {
                const size_t at = j * n + i;
                uint32_t* const plane = z + j * kColumns;
                wrong |= unmask(answer + t * rows + at, image + t * rows + at, count, plane);
                for (size_t k = 0; k < checks.count; k++) add(sums[t][k], checks.vectors + k * rows + at, plane, count);
            }
            float* const y = tile + t * kColumns;
            if (planes == 1)  // constants make loops that the compiler unrolls
                combine_planes(z, factors, 1, count, inv_c[t], y);
            else if (planes == 2)
                combine_planes(z, factors, 2, count, inv_c[t], y);
            else
                combine_planes(z, factors, planes, count, inv_c[t], y);
        }
        join<B>(tile, kColumns, count, scratch + i * B);
    }
    for (size_t t = 0; t < B; t++)
        for (size_t j = 0; j < checks.count; j++) wrong |= value(sums[t][j]) ^ expected[t * checks.count + j];
    if (blinding.perm) unblind<B>(blinding, n, v, w);
    for (size_t i = 0; i < n; i += kColumns) {
        const size_t count = n - i < kColumns ? n - i : kColumns;
        part<B>(scratch + i * B, count, tile, kColumns);
        for (size_t t = 0; t < B; t++)
            for (size_t k = 0; k < count; k++) out[t * n + i + k] += tile[t * kColumns + k];
    }
    return !wrong;
}

// Calls f(first, integral constant B) on B rows at a time, as many as there are registers for.
template <size_t N>
struct Count {
    static constexpr size_t value = N;
};
template <class F>
inline void by_rows(size_t tokens, F f) {
    size_t t = 0;
    if constexpr (kLanes > 4)
        for (; t + 8 <= tokens; t += 8) f(t, Count<8>());
    for (; t + 4 <= tokens; t += 4) f(t, Count<4>());
    for (; t < tokens; t++) f(t, Count<1>());
}

bool encode(const float* x, const uint32_t* r, size_t tokens, size_t n, double length, const Blinding& blinding,
            const Checks& checks, float* scratch, uint32_t* masked, double* inv_c, uint32_t* expected) {
    bool finite = true;
    by_rows(tokens, [&](size_t t, auto b) {
        finite &= encode_rows<b.value>(x + t * n, r + t * n, n, length, blinding, checks, scratch, masked + t * n,
                                       inv_c + t, expected + t * checks.count);
    });
    return finite;
}

bool decode(const uint32_t* answer, const uint32_t* image, size_t tokens, const float* scales, size_t planes, size_t n,
            const double* inv_c, const Blinding& blinding, const Checks& checks, const uint32_t* expected,
            float* scratch, float* out) {
    bool right = true;
    by_rows(tokens, [&](size_t t, auto b) {
        right &= decode_rows<b.value>(answer + t * planes * n, image + t * planes * n, scales, planes, n, inv_c + t,
                                      blinding, checks, expected + t * checks.count, scratch, out + t * n);
    });
    return right;
}

}  // namespace
}  // namespace slip
