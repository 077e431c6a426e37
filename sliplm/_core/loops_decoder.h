// A decoder layer's own operations for a decoding step: low-rank products, RMS norm, rotary embedding, attention.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_sums.h"

namespace slip {
namespace {

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t SixteenWords __attribute__((vector_size(64)));
typedef int32_t SixteenInts __attribute__((vector_size(64)));
typedef uint16_t SixteenHalves __attribute__((vector_size(32), aligned(2), may_alias));

inline float widen(float w) { return w; }
inline float widen(uint16_t w) { return __builtin_bit_cast(float, uint32_t(w) << 16); }
inline Sixteen widen16(const float* w) { return *reinterpret_cast<const Sixteen*>(w); }
inline Sixteen widen16(const uint16_t* w) {
    return (Sixteen)(__builtin_convertvector(*reinterpret_cast<const SixteenHalves*>(w), SixteenWords) << 16);
}

// `T` vectors of 16 sums stay in registers while the rows of bt pass by.
template <size_t T, class W>
inline void shrink_strip(const float* x, size_t n, const W* bt, size_t width, float* low) {
    Sixteen sum[T] = {};
    for (size_t k = 0; k < n; k++)
#pragma GCC unroll 8
        for (size_t i = 0; i < T; i++) sum[i] += x[k] * widen16(bt + k * width + 16 * i);
    for (size_t i = 0; i < T; i++) reinterpret_cast<Sixteen*>(low)[i] = sum[i];
}

template <class W>
void shrink(const float* x, size_t n, const W* bt, size_t width, float* low) {
    for (size_t w = 0; w < width; w += 128) switch ((width - w) / 16) {
            case 1: shrink_strip<1>(x, n, bt + w, width, low + w); break;
            case 2: shrink_strip<2>(x, n, bt + w, width, low + w); break;
            case 3: shrink_strip<3>(x, n, bt + w, width, low + w); break;
            case 4: shrink_strip<4>(x, n, bt + w, width, low + w); break;
            case 5: shrink_strip<5>(x, n, bt + w, width, low + w); break;
            case 6: shrink_strip<6>(x, n, bt + w, width, low + w); break;
            case 7: shrink_strip<7>(x, n, bt + w, width, low + w); break;
            default: shrink_strip<8>(x, n, bt + w, width, low + w);
        }
}

template <class W>
void expand(const float* low, size_t rank, const W* at, size_t n, float* out) {
    size_t r = 0;
    for (; r + 8 <= rank; r += 8) {  // eight rows per pass, or `out` would be the traffic
        const W* a = at + r * n;
        const float* l = low + r;
        for (size_t i = 0; i < n; i++)
            out[i] += ((l[0] * widen(a[i]) + l[1] * widen(a[n + i])) +
                       (l[2] * widen(a[2 * n + i]) + l[3] * widen(a[3 * n + i]))) +
                      ((l[4] * widen(a[4 * n + i]) + l[5] * widen(a[5 * n + i])) +
                       (l[6] * widen(a[6 * n + i]) + l[7] * widen(a[7 * n + i])));
    }
    for (; r < rank; r++)
        for (size_t i = 0; i < n; i++) out[i] += low[r] * widen(at[r * n + i]);
}

void rms_norm(const float* x, const float* weight, size_t n, double eps, float* out) {
    const float scale = float(1 / std::sqrt(squared_length(x, n) / n + eps));
    for (size_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

// Rotary embedding, the halves of a head being the pairs (Su et al., arXiv 2104.09864, as Transformers lays it out).
void rotate(float* x, size_t heads, size_t size, const float* cos, const float* sin) {
    const size_t half = size / 2;
    for (size_t h = 0; h < heads; h++, x += size)
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[half + i];
            x[i] = a * cos[i] - b * sin[i];
            x[half + i] = b * cos[half + i] + a * sin[half + i];
        }
}

inline float total(Sixteen v) {
    float part[16];
    __builtin_memcpy(part, &v, sizeof part);
#pragma GCC unroll 4
    for (int width = 8; width; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) part[i] += part[width + i];
    return part[0];
}

// exp(x) for x <= 0, to 2 units in the last place; below -87 it is exp(-87). Cephes' expf, all lanes at a time.
inline Sixteen exponential(Sixteen x) {
    x = x < -87 ? Sixteen{} - 87 : x;
    const Sixteen n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to the nearest integer
    const Sixteen r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Sixteen y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1;
    return y * (Sixteen)((__builtin_convertvector(n, SixteenInts) + 127) << 23);
}

// In place, and what the values add up to; `count` is a multiple of 16.
inline float exponentials(float* x, size_t count) {
    Sixteen* v = reinterpret_cast<Sixteen*>(x);
    Sixteen top = v[0], sum = {};
    for (size_t i = 1; i < count / 16; i++) top = v[i] > top ? v[i] : top;
    float most = top[0];
    for (int i = 1; i < 16; i++) most = top[i] > most ? top[i] : most;
    for (size_t i = 0; i < count / 16; i++) sum += v[i] = exponential(v[i] - most);
    return total(sum);
}

template <size_t T>
void attend_tile(const float* q, const float* keys, const float* values, size_t count, size_t size, size_t key_step,
                 size_t value_step, float scale, float* scores, float* out) {
    const size_t whole = size & ~size_t(15), width = (count + 15) & ~size_t(15);
    for (size_t s = 0; s < count; s++) {
        const float* k = keys + s * key_step;
        Sixteen part[T] = {};
        for (size_t i = 0; i < whole; i += 16)
#pragma GCC unroll 4
            for (size_t t = 0; t < T; t++)
                part[t] +=
                    *reinterpret_cast<const Sixteen*>(q + t * size + i) * *reinterpret_cast<const Sixteen*>(k + i);
#pragma GCC unroll 4
        for (size_t t = 0; t < T; t++) {
            float sum = total(part[t]);
            for (size_t i = whole; i < size; i++) sum += q[t * size + i] * k[i];
            scores[t * width + s] = sum * scale;
        }
    }
    float inverse[T];
    for (size_t t = 0; t < T; t++) {
        for (size_t s = count; s < width; s++) scores[t * width + s] = -INFINITY;
        inverse[t] = 1 / exponentials(scores + t * width, width);
    }
    for (size_t i = 0; i < whole; i += 16) {
        Sixteen sum[T] = {};
        for (size_t s = 0; s < count; s++)
#pragma GCC unroll 4
            for (size_t t = 0; t < T; t++)
                sum[t] += scores[t * width + s] * *reinterpret_cast<const Sixteen*>(values + s * value_step + i);
        for (size_t t = 0; t < T; t++) *reinterpret_cast<Sixteen*>(out + t * size + i) = sum[t] * inverse[t];
    }
    for (size_t t = 0; t < T; t++)
        for (size_t i = whole; i < size; i++) {
            float sum = 0;
            for (size_t s = 0; s < count; s++) sum += scores[t * width + s] * values[s * value_step + i];
            out[t * size + i] = sum * inverse[t];
        }
}

// softmax(scale q K^T) V for up to four query heads that read the same keys and values.
void attend(const float* q, size_t heads, const float* keys, const float* values, size_t count, size_t size,
            size_t key_step, size_t value_step, float scale, float* scores, float* out) {
    switch (heads) {
        case 1: attend_tile<1>(q, keys, values, count, size, key_step, value_step, scale, scores, out); break;
        case 2: attend_tile<2>(q, keys, values, count, size, key_step, value_step, scale, scores, out); break;
        case 3: attend_tile<3>(q, keys, values, count, size, key_step, value_step, scale, scores, out); break;
        default: attend_tile<4>(q, keys, values, count, size, key_step, value_step, scale, scores, out);
    }
}

}  // namespace
}  // namespace slip
