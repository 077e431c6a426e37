// A decoder layer's own operations for a decoding step: low-rank products, RMS norm, rotary embedding, attention.
#pragma once
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>

#include "core.h"
#include "loops_blinding.h"
#include "loops_sums.h"

namespace slip {
namespace {

typedef uint32_t LaneWords __attribute__((vector_size(4 * kLanes)));
typedef uint16_t LaneHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline float widen(float w) { return w; }
inline float widen(uint16_t w) { return __builtin_bit_cast(float, uint32_t(w) << 16); }

// As many weights as a register has room for: GCC takes vectors that are wider than one apart, value by value.
inline Lanes lanes(const float* w) { return *reinterpret_cast<const Lanes*>(w); }
inline Lanes lanes(const uint16_t* w) {
#if defined(__AVX512F__)  // GCC would take this apart as well
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w)), 16);
#else
    return (Lanes)(__builtin_convertvector(*reinterpret_cast<const LaneHalves*>(w), LaneWords) << 16);
#endif
}

// a b + c, rounded once where there is an instruction for it.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
inline Lanes fused(float a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Lanes)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Lanes)vfmaq_n_f32((float32x4_t)c, (float32x4_t)b, a);
#else
    return a * b + c;
#endif
}

constexpr size_t kSums = kLanes == 16 ? 16 : 8;  // registers that are left for sums

// T rows of x, V registers of columns: the sums, which begin with what is there, stay in registers while the rows of w
// pass by.
template <size_t T, size_t V, class W>
inline void product_tile(const float* x, size_t x_step, size_t n, const W* w, size_t w_step, float* y, size_t y_step) {
    Lanes sum[T][V];
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; v++) sum[t][v] = lanes(y + t * y_step + kLanes * v);
    for (size_t k = 0; k < n; k++) {
        Lanes b[V];
#pragma GCC unroll 4
        for (size_t v = 0; v < V; v++) b[v] = lanes(w + k * w_step + kLanes * v);
#pragma GCC unroll 16
        for (size_t t = 0; t < T; t++)
#pragma GCC unroll 4
            for (size_t v = 0; v < V; v++) sum[t][v] = fused(x[t * x_step + k], b[v], sum[t][v]);
    }
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; v++) *reinterpret_cast<Lanes*>(y + t * y_step + kLanes * v) = sum[t][v];
}

// Columns of one block from `i` on, as many as V registers hold at a time; where the rest begins.
template <size_t V, class W>
inline size_t product_columns(const float* x, size_t x_step, size_t tokens, size_t n, const W* w, size_t columns,
                              size_t i, float* y, size_t y_step) {
    for (; i + V * kLanes <= columns; i += V * kLanes) {
        size_t t = 0;
        const auto tiles = [&]<size_t T>() {
            for (; t + T <= tokens; t += T)
                product_tile<T, V>(x + t * x_step, x_step, n, w + i, columns, y + t * y_step + i, y_step);
        };
        tiles.template operator()<kSums / V>();
        if constexpr (kSums / V > 4) tiles.template operator()<4>();
        tiles.template operator()<1>();
    }
    return i;
}

// Sums are taken in the order of k, whatever the tile, so that a row's result does not depend on the rows beside it.
template <class W>
void product(const float* x, size_t x_step, size_t tokens, size_t n, const W* w, size_t columns, float* y,
             size_t y_step) {
    for (; columns; w += kColumns * n, y += kColumns, columns -= kColumns) {
        const size_t block = columns < kColumns ? columns : kColumns;
        size_t i = 0;
        if (tokens < 4)  // one row alone needs more sums, or each addition waits for the one before
            i = product_columns<4>(x, x_step, tokens, n, w, block, i, y, y_step);
        i = product_columns<2>(x, x_step, tokens, n, w, block, i, y, y_step);
        i = product_columns<1>(x, x_step, tokens, n, w, block, i, y, y_step);
        for (size_t t = 0; t < tokens; t++)
            for (size_t c = i; c < block; c++) {
                float sum = y[t * y_step + c];
                for (size_t k = 0; k < n; k++) sum = fused(x[t * x_step + k], widen(w[k * block + c]), sum);
                y[t * y_step + c] = sum;
            }
        if (columns <= kColumns) return;
    }
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

// x / (1 + exp(-x)): SiLU, with an exponential that never overflows. Below -87 it is less than 1e-35.
inline Lanes silu(Lanes x) {
    x = x < -87 ? Lanes{} - 87 : x;
    const Lanes small = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? small : Lanes{} + 1) / (1 + small);
}

// out (n) = silu(gate) * up (Shazeer, arXiv 2002.05202).
void gated(const float* gate, const float* up, size_t n, float* out) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) *reinterpret_cast<Lanes*>(out + i) = silu(lanes(gate + i)) * lanes(up + i);
    if (i == n) return;
    Lanes g = {}, u = {};
    for (size_t k = i; k < n; k++) g[k - i] = gate[k], u[k - i] = up[k];
    g = silu(g) * u;
    for (size_t k = i; k < n; k++) out[k] = g[k - i];
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
