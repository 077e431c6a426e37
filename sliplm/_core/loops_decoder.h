// A decoder layer's own operations for one token: low-rank products, RMS norm, rotary embedding, attention.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_sums.h"

namespace slip {
namespace {

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t SixteenWords __attribute__((vector_size(64)));
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

// softmax(scale q K^T) V for one query head.
void attend(const float* q, const float* keys, const float* values, size_t count, size_t size, float scale,
            float* scores, float* out) {
    const size_t whole = size & ~size_t(15);
    float top = -INFINITY;
    for (size_t s = 0; s < count; s++) {
        const float* k = keys + s * size;
        Sixteen part = {};
        for (size_t i = 0; i < whole; i += 16)
            part += *reinterpret_cast<const Sixteen*>(q + i) * *reinterpret_cast<const Sixteen*>(k + i);
        float sum = 0;
        for (int i = 0; i < 16; i++) sum += part[i];
        for (size_t i = whole; i < size; i++) sum += q[i] * k[i];
        scores[s] = sum * scale;
        top = scores[s] > top ? scores[s] : top;
    }
    float total = 0;
    for (size_t s = 0; s < count; s++) total += scores[s] = std::exp(scores[s] - top);
    for (size_t i = 0; i < size; i++) out[i] = 0;
    for (size_t s = 0; s < count; s++) {
        const float weight = scores[s] / total;
        for (size_t i = 0; i < size; i++) out[i] += weight * values[s * size + i];
    }
}

}  // namespace
}  // namespace slip
