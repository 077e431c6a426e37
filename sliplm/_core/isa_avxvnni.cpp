// AVX-VNNI: the same instruction on 32 bytes, for processors without AVX-512.
#include <cpuid.h>
#include <immintrin.h>

#include "core.h"

namespace {
struct Ops {
    static constexpr size_t kSums = 4, kShift = 8, kQuadBytes = 16, kTokenTile = 1;
    static constexpr int kRowTile(int) { return 1; }
    static constexpr size_t kQuadsAtOnce(size_t) { return 512; }
    static constexpr size_t kFetched = 0;

    template <int R, int T>
    static inline void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t, size_t quads, int32_t* acc,
                            size_t, size_t digit_stride) {
        __m256i sum[4][2];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                sum[j][h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + j * digit_stride + h * 8));
        for (size_t q = 0; q < quads; q++, w += stride, d += 16) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                int32_t quad;
                __builtin_memcpy(&quad, d + j * 4, 4);
                const __m256i digits = _mm256_set1_epi32(quad);
                sum[j][0] = _mm256_dpbusd_avx_epi32(sum[j][0], digits, low);
                sum[j][1] = _mm256_dpbusd_avx_epi32(sum[j][1], digits, high);
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + j * digit_stride + h * 8), sum[j][h]);
    }
};
}  // namespace

#include "loops.h"

namespace slip {
extern constinit const Isa kAvxVnni = make("avxvnni", [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
});
}  // namespace slip
