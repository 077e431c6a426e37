// AVX2 has no exact product of bytes, as vpmaddubsw saturates, so x has two signed digits of 16 bits: with z = x mod p in
// [-2^30, 2^30], z = d_0 + 2^16 d_1. vpmaddwd multiplies them by weights widened to 16 bits and adds pairs in 32 bits: at
// most 2^23 each time, so that 64 quads fit. After those, a sum s goes to memory as s mod 2^16 and s >> 16, at 2^0,
// 2^16 and 2^32; with fewer than 65536 columns these stay below 2^26.
#include <immintrin.h>

#include "core.h"

namespace {
struct Ops {
    static constexpr size_t kSums = 3, kShift = 16, kQuadBytes = 16, kTokenTile = 3;
    static constexpr int kRowTile(int) { return 1; }
    // A tile reads a quarter of each 256 bytes, so the blocks beside it should find the rest near by: in a page of memory
    // for few tokens, which also asks for the next page, in L1 for many, where arithmetic is the limit.
    static constexpr size_t kQuadsAtOnce(size_t tokens) { return tokens <= kTokenTile ? 16 : 64; }
    static constexpr size_t kFetched = 16;

    // out[quad][digit][4], 16 bits each.
    static void split(const uint32_t* x, size_t n, uint8_t* out) {
        for (size_t q = 0; q * 4 < n; q++) {
            int16_t digits[8] = {};
            for (size_t k = 0; k < 4 && q * 4 + k < n; k++) {
                const uint32_t word = x[q * 4 + k];
                const uint32_t reduced = (word & slip::P) + (word >> 31);  // at most 2^31
                const int32_t z = int32_t(reduced > slip::P / 2 ? reduced - slip::P : reduced);
                digits[k] = int16_t(z);
                digits[4 + k] = int16_t((z - digits[k]) >> 16);
            }
            __builtin_memcpy(out + q * kQuadBytes, digits, kQuadBytes);
        }
    }

    template <int R, int T>
    static inline void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t token_bytes, size_t quads,
                            int32_t* acc, size_t token_stride, size_t sum_stride) {
        if constexpr (T == 1) {
            rows<4, T>(w, stride, d, token_bytes, quads, acc, token_stride, sum_stride);
        } else {  // more tokens leave registers for half a block
            rows<2, T>(w, stride, d, token_bytes, quads, acc, token_stride, sum_stride);
            rows<2, T>(w + 32, stride, d, token_bytes, quads, acc + 8, token_stride, sum_stride);
        }
    }

private:
    // V x 4 rows. A register of sums holds two for each of four rows.
    template <int V, int T>
    static inline void rows(const int8_t* w, size_t stride, const uint8_t* d, size_t token_bytes, size_t quads,
                            int32_t* acc, size_t token_stride, size_t sum_stride) {
        __m256i sum[T][2][V];
#pragma GCC unroll 3
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[t][j][v] = _mm256_setzero_si256();
        for (size_t q = 0; q < quads; q++, w += stride, d += kQuadBytes) {
            __m256i weights[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                weights[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + v * 16)));
#pragma GCC unroll 3
            for (int t = 0; t < T; t++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    int64_t quad;
                    __builtin_memcpy(&quad, d + t * token_bytes + j * 8, 8);
                    const __m256i digits = _mm256_set1_epi64x(quad);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) {
                        sum[t][j][v] = _mm256_add_epi32(sum[t][j][v], _mm256_madd_epi16(weights[v], digits));
                        stay(sum[t][j][v]);
                    }
                }
        }
#pragma GCC unroll 3
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v += 2) {
                const __m256i low = eight(sum[t][0][v], sum[t][0][v + 1]);
                const __m256i high = eight(sum[t][1][v], sum[t][1][v + 1]);
                const __m256i mask = _mm256_set1_epi32(0xFFFF);
                int32_t* out = acc + t * token_stride + v * 4;
                add(out, _mm256_and_si256(low, mask));
                add(out + sum_stride, _mm256_add_epi32(_mm256_srai_epi32(low, 16), _mm256_and_si256(high, mask)));
                add(out + 2 * sum_stride, _mm256_srai_epi32(high, 16));
            }
    }

    // In one register, from one turn of the loop to the next: GCC moves sums around, and out to memory.
    static inline void stay(__m256i& sum) { asm("" : "+x"(sum)); }

    // Pairs added: the sums of eight rows, in order.
    static inline __m256i eight(__m256i a, __m256i b) {
        return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
    }

    static inline void add(int32_t* out, __m256i values) {
        __m256i* at = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), values));
    }
};
}  // namespace

#include "loops.h"

namespace slip {
extern constinit const Isa kAvx2 = make("avx2", [] { return bool(__builtin_cpu_supports("avx2")); });
}  // namespace slip
