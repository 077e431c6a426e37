// The trusted arithmetic of an exchange: encoding and masking, the check, unmasking and decoding.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_blinding.h"
#include "loops_sums.h"

namespace slip {
namespace {

bool canonical(const uint32_t* x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= x[i] >= P;
    return !bad;
}

uint32_t dot(const uint32_t* u, const uint32_t* y, size_t n) {
    uint64_t low = 0, high = 0;  // n < 2^32 halves of 32 bits fit
    for (size_t i = 0; i < n; i++) {
        const uint64_t product = uint64_t(u[i]) * y[i];
        low += product & 0xFFFFFFFF;
        high += product >> 32;
    }
    return uint32_t((low % P + 2 * (high % P)) % P);  // 2^32 = 2 mod p
}

void project(uint32_t u, const int8_t* q, size_t n, int64_t* acc) {
    const int32_t factor = int32_t(u);
    for (size_t k = 0; k < n; k++) acc[k] += int64_t(factor) * int32_t(q[k]);
}

// float32 is enough in here, once x is of a size that it has room for: its rounding is a hundredth of what fixed point
// costs anyway.
bool encode(const float* x, const uint32_t* r, size_t n, double length, const Blinding& blinding, float* v,
            uint32_t* masked, double* inv_c) {
    uint32_t peak = 0;  // of the magnitudes' bits, which are in the magnitudes' order; NaNs are above infinity
    for (size_t i = 0; i < n; i++) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7FFFFFFF;
        peak = magnitude > peak ? magnitude : peak;
    }
    if (peak >= 0x7F800000) return false;
    const double size = peak ? std::ldexp(1.0, -std::ilogb(__builtin_bit_cast(float, peak))) : 1;
    for (size_t i = 0; i < n; i++) v[i] = float(x[i] * size);
    if (blinding.perm) {
        static_assert(Blinding::kRounds == 4, "from v to w and back, twice");
        float* w = v + n;
        const size_t step = n / 2 * 2;
        forward_round(v, blinding.perm, blinding.turns, n, w);
        for (size_t i = 0; i < n; i++) w[i] *= blinding.diagonal[i];
        forward_round(w, blinding.perm + n, blinding.turns + step, n, v);
        forward_round(v, blinding.perm + 2 * n, blinding.turns + 2 * step, n, w);
        forward_round(w, blinding.perm + 3 * n, blinding.turns + 3 * step, n, v);
    }
    const double square = squared_length(v, n);
    const double c = square > 0 ? length / std::sqrt(square) : 1;
    *inv_c = 1 / (c * size);
    for (size_t i = 0; i < n; i++) {
        const int32_t value = int32_t(std::rint(v[i] * c));  // |value| < p / 2
        const uint32_t sum = uint32_t(value < 0 ? value + int32_t(P) : value) + r[i];
        masked[i] = sum >= P ? sum - P : sum;
    }
    return true;
}

// Unmasked and scaled, plane by plane; the scaled sums are taken in float64 and rounded once.
inline void unmask(const uint32_t* answer, const uint32_t* image, const float* scales, size_t planes, size_t n,
                   double inv_c, float* v) {
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (size_t j = 0; j < planes; j++) {
            int32_t z = int32_t(answer[j * n + i]) - int32_t(image[j * n + i]);  // both below p: no overflow
            z += z < -int32_t(P / 2) ? int32_t(P) : 0;
            z -= z > int32_t(P / 2) ? int32_t(P) : 0;
            sum += double(scales[j * n + i]) * z;
        }
        v[i] = float(sum * inv_c);
    }
}

void decode(const uint32_t* answer, const uint32_t* image, const float* scales, size_t planes, size_t n, double inv_c,
            const Blinding& blinding, float* v, float* out) {
    if (planes == 2)
        unmask(answer, image, scales, 2, n, inv_c, v);
    else if (planes == 1)
        unmask(answer, image, scales, 1, n, inv_c, v);
    else
        unmask(answer, image, scales, planes, n, inv_c, v);
    if (!blinding.perm) {
        for (size_t i = 0; i < n; i++) out[i] += v[i];
        return;
    }
    float *from = v, *to = v + n;
    for (size_t round = Blinding::kRounds; round-- > 1;) {
        backward_round(from, blinding.turns + round * (n / 2 * 2), n);
        const int32_t* perm = blinding.perm + round * n;
        for (size_t i = 0; i < n; i++) to[perm[i]] = from[i];
        float* swap = from;
        from = to, to = swap;
    }
    for (size_t i = 0; i < n; i++) from[i] /= blinding.diagonal[i];
    backward_round(from, blinding.turns, n);
    for (size_t i = 0; i < n; i++) out[blinding.perm[i]] += from[i];
}

}  // namespace
}  // namespace slip
