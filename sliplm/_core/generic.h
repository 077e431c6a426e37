// The loops that need no intrinsics, and the walk over tiles. Included once per instruction set, after `Ops`, so that
// the compiler vectorises them for it. Everything is in an anonymous namespace and free of standard templates: code
// compiled for one instruction set must never be linked into another's callers.
//
// Ops provides: kDigits, kShift, kRowTile, kTokenTile, and
//   template <int R, int T> tile(w, stride, d, token_bytes, quads, acc, token_stride, digit_stride)
#include <cmath>

#include "core.h"

namespace slip {
namespace {

constexpr size_t kD = Ops::kDigits;

inline void split(const uint32_t* x, size_t n, uint8_t* out) {
    constexpr uint32_t mask = (1u << Ops::kShift) - 1;
    const size_t whole = n / kQuad;
    for (size_t q = 0; q < whole; q++)
        for (size_t j = 0; j < kD; j++)
            for (size_t k = 0; k < kQuad; k++)
                out[(q * kD + j) * kQuad + k] = uint8_t(x[q * kQuad + k] >> (Ops::kShift * j) & mask);
    for (size_t k = 0; n % kQuad && k < kQuad; k++) {
        const uint32_t value = whole * kQuad + k < n ? x[whole * kQuad + k] : 0;
        for (size_t j = 0; j < kD; j++) out[(whole * kD + j) * kQuad + k] = uint8_t(value >> (Ops::kShift * j) & mask);
    }
}

template <int R, int T>
inline void tile(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t quads, int32_t* acc) {
    Ops::template tile<R, T>(w, blocks * kRows * kQuad, d, token_bytes, quads, acc, kD * blocks * kRows, blocks * kRows);
}

template <int T>
inline void rows(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t quads, int32_t* acc) {
    constexpr int R = Ops::kRowTile(T);
    size_t b = 0;
    for (; b + R <= blocks; b += R) tile<R, T>(w + b * kRows * kQuad, blocks, d, token_bytes, quads, acc + b * kRows);
    for (; b < blocks; b++) tile<1, T>(w + b * kRows * kQuad, blocks, d, token_bytes, quads, acc + b * kRows);
}

void multiply(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t tokens, size_t quads,
              int32_t* acc) {
    constexpr size_t T = Ops::kTokenTile;
    const size_t step = kD * blocks * kRows;
    size_t t = 0;
    if constexpr (T > 1) {
        for (; t + T <= tokens && tokens - t != T + 1; t += T)  // two pairs rather than T and a straggler
            rows<T>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
        for (; t + 2 <= tokens; t += 2) rows<2>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
    }
    for (; t < tokens; t++) rows<1>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
}

void combine(const int32_t* acc, size_t stride, size_t rows, uint32_t* out) {
    for (size_t i = 0; i < rows; i++) {
        int64_t sum = int64_t(P) << 30;  // a multiple of p that makes the sum, above -2^60, positive
        for (size_t j = 0; j < kD; j++) sum += int64_t(acc[j * stride + i]) * (int64_t(1) << (Ops::kShift * j));
        uint64_t z = uint64_t(sum);
        z = (z & P) + (z >> 31);
        z = (z & P) + (z >> 31);
        out[i] = uint32_t(z >= P ? z - P : z);
    }
}

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

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t SixteenWords __attribute__((vector_size(64)));
typedef uint16_t SixteenHalves __attribute__((vector_size(32), aligned(2), may_alias));

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
inline void forward_round(const float* __restrict from, const int32_t* perm, const float* turns, size_t n, float* __restrict to) {
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
    double part[8] = {};  // several sums, or the loop waits for one addition after the other
    const size_t even = n & ~size_t(7);
    for (size_t i = 0; i < even; i += 8)
        for (int k = 0; k < 8; k++) part[k] += double(v[i + k]) * v[i + k];
    for (size_t i = even; i < n; i++) part[0] += double(v[i]) * v[i];
    double square = 0;
    for (double s : part) square += s;
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
    double part[8] = {};
    const size_t even = n & ~size_t(7);
    for (size_t i = 0; i < even; i += 8)
        for (int k = 0; k < 8; k++) part[k] += double(x[i + k]) * x[i + k];
    for (size_t i = even; i < n; i++) part[0] += double(x[i]) * x[i];
    double square = 0;
    for (double s : part) square += s;
    const float scale = float(1 / std::sqrt(square / n + eps));
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
void attend(const float* q, const float* keys, const float* values, size_t count, size_t size, float scale, float* scores,
            float* out) {
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

constexpr Isa make(const char* name, bool (*supported)()) {
    return {name,      supported, Ops::kDigits, Ops::kShift, split,  multiply, combine,
            canonical, dot,       project,      encode,      decode, shrink<float>, expand<float>, rms_norm, rotate, attend, shrink<uint16_t>, expand<uint16_t>};
}

}  // namespace
}  // namespace slip
