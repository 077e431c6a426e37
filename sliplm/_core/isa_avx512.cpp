// AVX-512 VNNI: vpdpbusd multiplies 64 weights by one broadcast quad of digits and adds in 32 bits, exactly.
#include <immintrin.h>

#include "core.h"

namespace {
struct Ops {
    static constexpr size_t kSums = 4, kShift = 8, kQuadBytes = 16, kTokenTile = 3;
    static constexpr int kRowTile(int tokens) { return tokens == 1 ? 4 : 2; }  // at most 24 of 32 registers accumulate
    static constexpr size_t kFetched = 0;
    static constexpr size_t kQuadsAtOnce(size_t) {
        return 512;
    }  // a group's slice stays in L2, three tokens' digits in L1

    template <int R, int T>
    static inline void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t token_bytes, size_t quads,
                            int32_t* acc, size_t token_stride, size_t digit_stride) {
        __m512i sum[T][4][R];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
                for (int b = 0; b < R; b++)
                    sum[t][j][b] = _mm512_loadu_si512(acc + t * token_stride + j * digit_stride + b * 16);
        for (size_t q = 0; q < quads; q++, w += stride, d += 16) {
            __m512i weights[R];
#pragma GCC unroll 4
            for (int b = 0; b < R; b++) weights[b] = _mm512_loadu_si512(w + b * 64);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    int32_t quad;
                    __builtin_memcpy(&quad, d + t * token_bytes + j * 4, 4);
                    const __m512i digits = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
                    for (int b = 0; b < R; b++) sum[t][j][b] = _mm512_dpbusd_epi32(sum[t][j][b], digits, weights[b]);
                }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
                for (int b = 0; b < R; b++)
                    _mm512_storeu_si512(acc + t * token_stride + j * digit_stride + b * 16, sum[t][j][b]);
    }
};
}  // namespace

#include "loops.h"

namespace slip {
extern constinit const Isa kAvx512 = make("avx512vnni", [] {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});
}  // namespace slip
