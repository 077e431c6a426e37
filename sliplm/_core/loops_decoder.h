// A decoder layer's own operations for a decoding step: low-rank products, RMS norm, rotary embedding, attention.
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
typedef uint32_t LaneWords __attribute__((vector_size(4 * kLanes)));
typedef uint16_t LaneHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline float widen(float w) { return w; }
inline float widen(uint16_t w) { return __builtin_bit_cast(float, uint32_t(w) << 16); }
inline Sixteen widen16(const float* w) { return *reinterpret_cast<const Sixteen*>(w); }
inline Sixteen widen16(const uint16_t* w) {
    return (Sixteen)(__builtin_convertvector(*reinterpret_cast<const SixteenHalves*>(w), SixteenWords) << 16);
}

// As many weights as a register has room for: GCC takes vectors that are wider than one apart, value by value.
inline Lanes lanes(const float* w) { return *reinterpret_cast<const Lanes*>(w); }
inline Lanes lanes(const uint16_t* w) {
    return (Lanes)(__builtin_convertvector(*reinterpret_cast<const LaneHalves*>(w), LaneWords) << 16);
}

constexpr size_t kSums = kLanes == 16 ? 16 : 8;  // registers that are left for sums

// T rows of x, V registers of columns of bt: the sums stay in registers while the rows of bt pass by.
template <size_t T, size_t V, class W>
inline void shrink_tile(const float* x, size_t n, const W* bt, size_t width, float* low) {
    Lanes sum[T][V] = {};
    for (size_t k = 0; k < n; k++) {
        Lanes b[V];
#pragma GCC unroll 8
        for (size_t v = 0; v < V; v++) b[v] = lanes(bt + k * width + kLanes * v);
#pragma GCC unroll 8
        for (size_t t = 0; t < T; t++)
#pragma GCC unroll 8
            for (size_t v = 0; v < V; v++) sum[t][v] += x[t * n + k] * b[v];
    }
    for (size_t t = 0; t < T; t++)
        for (size_t v = 0; v < V; v++) reinterpret_cast<Lanes*>(low + t * width)[v] = sum[t][v];
}

template <size_t T, class W>
inline void shrink_rows(const float* x, size_t n, const W* bt, size_t width, float* low) {
    constexpr size_t V = kSums / T < 4 ? kSums / T : 4;
    size_t w = 0;
    if constexpr (V > 1)
        for (; w + kLanes * V <= width; w += kLanes * V) shrink_tile<T, V>(x, n, bt + w, width, low + w);
    if constexpr (V > 2) {
        for (; w + 3 * kLanes <= width; w += 3 * kLanes) shrink_tile<T, 3>(x, n, bt + w, width, low + w);
        for (; w + 2 * kLanes <= width; w += 2 * kLanes) shrink_tile<T, 2>(x, n, bt + w, width, low + w);
    }
    for (; w < width; w += kLanes) shrink_tile<T, 1>(x, n, bt + w, width, low + w);
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

// Sums of values `H` apart: x's in the lanes whose number lacks that bit, y's in the others.
template <int H, int... I>
inline Lanes merge(Lanes x, Lanes y) {
    constexpr int n = kLanes;
#if defined(__clang__)
    return __builtin_shufflevector(x, y, (I & H ? n + I : I)...) +
           __builtin_shufflevector(x, y, (I & H ? n + (I ^ H) : I ^ H)...);
#else
    return __builtin_shuffle(x, y, LaneIndices{(I & H ? n + I : I)...}) +
           __builtin_shuffle(x, y, LaneIndices{(I & H ? n + (I ^ H) : I ^ H)...});
#endif
}

// The totals of as many registers as one has lanes, each in its register's lane of x[0].
template <int H = kLanes / 2>
inline void totals(Lanes* x) {
#pragma GCC unroll 8
    for (int i = 0; i < H; i++) x[i] = merge<H, SLIP_LANES>(x[i], x[i + H]);
    if constexpr (H > 1) totals<H / 2>(x);
}

// exp(x) for x <= 0, to 2 units in the last place; below -87 it is exp(-87). Cephes' expf, all lanes at a time.
inline Lanes exponential(Lanes x) {
    x = x < -87 ? Lanes{} - 87 : x;
    const Lanes n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to the nearest integer
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1;
    return y * (Lanes)((__builtin_convertvector(n, LaneIndices) + 127) << 23);
}

// Keys and values of one head, so many floats apart.
struct Seen {
    const float *keys, *values;
    size_t count, size, key_step, value_step;
};

// The scores of T query heads come in registers: T x kKeys of them, a head's side by side.
template <size_t T>
constexpr size_t kKeys = kLanes / T;

template <size_t T>
void score(const float* q, const Seen& seen, float scale, Lanes* scores) {
    const size_t size = seen.size, whole = size / kLanes * kLanes;
    for (size_t s = 0; s < seen.count; s += kKeys<T>) {
        const float* k[kKeys<T>];
        for (size_t i = 0; i < kKeys<T>; i++)  // after the last one, the last one again
            k[i] = seen.keys + (s + i < seen.count ? s + i : seen.count - 1) * seen.key_step;
        Lanes sum[kLanes] = {};
        for (size_t d = 0; d < whole; d += kLanes)
#pragma GCC unroll 16
            for (size_t i = 0; i < kKeys<T>; i++)
#pragma GCC unroll 4
                for (size_t t = 0; t < T; t++)
                    sum[t * kKeys<T> + i] +=
                        *reinterpret_cast<const Lanes*>(q + t * size + d) * *reinterpret_cast<const Lanes*>(k[i] + d);
        totals(sum);
        for (size_t d = whole; d < size; d++)
            for (size_t l = 0; l < kLanes; l++) sum[0][l] += q[l / kKeys<T> * size + d] * k[l % kKeys<T>][d];
        sum[0] *= scale;
        for (size_t l = 0; l < kLanes; l++)
            if (s + l % kKeys<T> >= seen.count) sum[0][l] = -INFINITY;
        *scores++ = sum[0];
    }
}

// exp(score - the head's highest), in place, and 1 over the sum of a head's.
template <size_t T>
void exponentials(Lanes* scores, size_t registers, float* inverse) {
    Lanes top = scores[0], sum = {};
    for (size_t i = 1; i < registers; i++) top = scores[i] > top ? scores[i] : top;
    for (size_t t = 0; t < T; t++) {
        float most = -INFINITY;
        for (size_t i = 0; i < kKeys<T>; i++) most = top[t * kKeys<T> + i] > most ? top[t * kKeys<T> + i] : most;
        for (size_t i = 0; i < kKeys<T>; i++) top[t * kKeys<T> + i] = most;
    }
    for (size_t i = 0; i < registers; i++) sum += scores[i] = exponential(scores[i] - top);
    for (size_t t = 0; t < T; t++) {
        float all = 0;
        for (size_t i = 0; i < kKeys<T>; i++) all += sum[t * kKeys<T> + i];
        inverse[t] = 1 / all;
    }
}

// R registers of the output of each head, from value d on, stay in registers while the values pass by.
template <size_t T, size_t R>
inline void weigh(const float* scores, const Seen& seen, const float* inverse, size_t d, float* out) {
    Lanes sum[R][T] = {};
    for (size_t s = 0; s < seen.count; s++) {
        const Lanes* v = reinterpret_cast<const Lanes*>(seen.values + s * seen.value_step + d);
        const float* w = scores + s / kKeys<T> * kLanes + s % kKeys<T>;
#pragma GCC unroll 4
        for (size_t t = 0; t < T; t++)
#pragma GCC unroll 4
            for (size_t r = 0; r < R; r++) sum[r][t] += w[t * kKeys<T>] * v[r];
    }
    for (size_t t = 0; t < T; t++)
        for (size_t r = 0; r < R; r++) reinterpret_cast<Lanes*>(out + t * seen.size + d)[r] = sum[r][t] * inverse[t];
}

template <size_t T>
void attend_tile(const float* q, const Seen& seen, float scale, float* scores, float* out) {
    float inverse[T];
    score<T>(q, seen, scale, reinterpret_cast<Lanes*>(scores));
    exponentials<T>(reinterpret_cast<Lanes*>(scores), (seen.count + kKeys<T> - 1) / kKeys<T>, inverse);
    constexpr size_t many = kLanes == 16 ? 4 : 2;  // as registers allow
    size_t d = 0;
    for (; d + many * kLanes <= seen.size; d += many * kLanes) weigh<T, many>(scores, seen, inverse, d, out);
    for (; d + kLanes <= seen.size; d += kLanes) weigh<T, 1>(scores, seen, inverse, d, out);
    for (; d < seen.size; d++)
        for (size_t t = 0; t < T; t++) {
            float sum = 0;
            for (size_t s = 0; s < seen.count; s++)
                sum +=
                    scores[s / kKeys<T> * kLanes + t * kKeys<T> + s % kKeys<T>] * seen.values[s * seen.value_step + d];
            out[t * seen.size + d] = sum * inverse[t];
        }
}

// softmax(scale q K^T) V for the query heads that read the same keys and values.
void attend(const float* q, size_t heads, const float* keys, const float* values, size_t count, size_t size,
            size_t key_step, size_t value_step, float scale, float* scores, float* out) {
    const Seen seen{keys, values, count, size, key_step, value_step};
    size_t h = 0;
    for (; h + 4 <= heads; h += 4) attend_tile<4>(q + h * size, seen, scale, scores, out + h * size);
    for (; h + 2 <= heads; h += 2) attend_tile<2>(q + h * size, seen, scale, scores, out + h * size);
    for (; h < heads; h++) attend_tile<1>(q + h * size, seen, scale, scores, out + h * size);
}

}  // namespace
}  // namespace slip
