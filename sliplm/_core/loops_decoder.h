// A decoder layer's own operations: low-rank products of several tokens, and for one token RMS norm, rotary embedding, attention.
#pragma once
#include <cmath>

#include "core.h"
#include "loops_blinding.h"
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

constexpr size_t kSums = kLanes == 16 ? 16 : 8;  // vectors of 16 sums that registers have room for

// T rows of x, V vectors of 16 columns of bt: the sums stay in registers while the rows of bt pass by.
template <size_t T, size_t V, class W>
inline void shrink_tile(const float* x, size_t n, const W* bt, size_t width, float* low) {
    Sixteen sum[T][V] = {};
    for (size_t k = 0; k < n; k++) {
        Sixteen b[V];
#pragma GCC unroll 8
        for (size_t v = 0; v < V; v++) b[v] = widen16(bt + k * width + 16 * v);
#pragma GCC unroll 8
        for (size_t t = 0; t < T; t++)
#pragma GCC unroll 8
            for (size_t v = 0; v < V; v++) sum[t][v] += x[t * n + k] * b[v];
    }
    for (size_t t = 0; t < T; t++)
        for (size_t v = 0; v < V; v++) reinterpret_cast<Sixteen*>(low + t * width)[v] = sum[t][v];
}

template <size_t T, class W>
inline void shrink_rows(const float* x, size_t n, const W* bt, size_t width, float* low) {
    constexpr size_t V = kSums / T < 4 ? kSums / T : 4;
    size_t w = 0;
    if constexpr (V > 1)
        for (; w + 16 * V <= width; w += 16 * V) shrink_tile<T, V>(x, n, bt + w, width, low + w);
    if constexpr (V > 2) {
        for (; w + 48 <= width; w += 48) shrink_tile<T, 3>(x, n, bt + w, width, low + w);
        for (; w + 32 <= width; w += 32) shrink_tile<T, 2>(x, n, bt + w, width, low + w);
    }
    for (; w < width; w += 16) shrink_tile<T, 1>(x, n, bt + w, width, low + w);
}

template <class W>
void shrink(const float* x, size_t tokens, size_t n, const W* bt, size_t width, float* low) {
    size_t t = 0;
    for (; t + 8 <= tokens; t += 8) shrink_rows<8>(x + t * n, n, bt, width, low + t * width);
    for (; t + 4 <= tokens; t += 4) shrink_rows<4>(x + t * n, n, bt, width, low + t * width);
    for (; t < tokens; t++) shrink_rows<1>(x + t * n, n, bt, width, low + t * width);
}

// Eight rows of at per pass, or `out` would be the traffic.
template <class W>
inline void expand_rows(const float* low, size_t tokens, size_t width, size_t rank, const W* at, size_t n, float* out,
                        size_t step) {
    size_t r = 0;
    for (; r + 8 <= rank; r += 8) {
        const W* a = at + r * n;
        size_t i = 0;
        for (; i + 16 <= n; i += 16) {
            Sixteen b[8];
#pragma GCC unroll 8
            for (size_t j = 0; j < 8; j++) b[j] = widen16(a + j * n + i);
            for (size_t t = 0; t < tokens; t++) {
                const float* l = low + t * width + r;
                *reinterpret_cast<Sixteen*>(out + t * step + i) +=
                    ((l[0] * b[0] + l[1] * b[1]) + (l[2] * b[2] + l[3] * b[3])) +
                    ((l[4] * b[4] + l[5] * b[5]) + (l[6] * b[6] + l[7] * b[7]));
            }
        }
        for (size_t t = 0; t < tokens; t++) {
            const float* l = low + t * width + r;
            for (size_t k = i; k < n; k++)
                out[t * step + k] += ((l[0] * widen(a[k]) + l[1] * widen(a[n + k])) +
                                      (l[2] * widen(a[2 * n + k]) + l[3] * widen(a[3 * n + k]))) +
                                     ((l[4] * widen(a[4 * n + k]) + l[5] * widen(a[5 * n + k])) +
                                      (l[6] * widen(a[6 * n + k]) + l[7] * widen(a[7 * n + k])));
        }
    }
    for (; r < rank; r++)
        for (size_t t = 0; t < tokens; t++)
            for (size_t i = 0; i < n; i++) out[t * step + i] += low[t * width + r] * widen(at[r * n + i]);
}

template <class W>
void expand(const float* low, size_t tokens, size_t width, size_t rank, const W* at, size_t n, float* out,
            size_t step) {
    if (tokens == 1)  // a constant: no loop over tokens within
        expand_rows(low, 1, width, rank, at, n, out, step);
    else
        expand_rows(low, tokens, width, rank, at, n, out, step);
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
