// AVX2. vpmaddubsw adds two products in 16 bits and saturates, so digits have 7 bits: 2 * 127 * 128 < 2^15.
#include <immintrin.h>

#include "core.h"

namespace {
struct Ops {
    static constexpr size_t kDigits = 5, kShift = 7, kTokenTile = 1;
    static constexpr int kRowTile(int) { return 1; }

    template <int R, int T>
    static inline void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t, size_t quads, int32_t* acc,
                            size_t, size_t digit_stride) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sum[5][2];
#pragma GCC unroll 5
        for (int j = 0; j < 5; j++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                sum[j][h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + j * digit_stride + h * 8));
        for (size_t q = 0; q < quads; q++, w += stride, d += 20) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 5
            for (int j = 0; j < 5; j++) {
                int32_t quad;
                __builtin_memcpy(&quad, d + j * 4, 4);
                const __m256i digits = _mm256_set1_epi32(quad);
                const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(digits, low), ones);
                const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(digits, high), ones);
                sum[j][0] = _mm256_add_epi32(sum[j][0], a);
                sum[j][1] = _mm256_add_epi32(sum[j][1], b);
            }
        }
#pragma GCC unroll 5
        for (int j = 0; j < 5; j++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + j * digit_stride + h * 8), sum[j][h]);
    }
};
}  // namespace

#include "loops.h"

namespace slip {
extern constinit const Isa kAvx2 = make("avx2", [] { return bool(__builtin_cpu_supports("avx2")); });
}  // namespace slip
