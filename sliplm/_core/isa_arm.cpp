// Arm. Compiled twice: with i8mm, sudot takes unsigned digits of 8 bits; with dotprod alone, sdot takes 7-bit digits,
// which are never negative. Either way one lane of the digit vector is broadcast by the instruction itself.
#include <arm_neon.h>

#include "core.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(__APPLE__)
bool feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
#endif

#ifdef SLIP_I8MM
constexpr size_t kArmDigits = 4;
#else
constexpr size_t kArmDigits = 5;
#endif

struct Ops {
    static constexpr size_t kSums = kArmDigits, kShift = kSums == 4 ? 8 : 7, kQuadBytes = 4 * kSums, kTokenTile = 1;
    static constexpr int kRowTile(int) { return 1; }
    static constexpr size_t kQuadsAtOnce(size_t) { return 512; }
    static constexpr size_t kFetched = 0;

    template <int J>
    static inline int32x4_t dot(int32x4_t sum, int8x16_t weights, uint8x16_t digits) {
#ifdef SLIP_I8MM
        return vsudotq_laneq_s32(sum, weights, digits, J);
#else
        return vdotq_laneq_s32(sum, weights, vreinterpretq_s8_u8(digits), J);
#endif
    }

    template <int R, int T>
    static inline void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t, size_t quads, int32_t* acc,
                            size_t, size_t digit_stride) {
        int32x4_t sum[kSums][4];
        for (size_t j = 0; j < kSums; j++)
            for (int b = 0; b < 4; b++) sum[j][b] = vld1q_s32(acc + j * digit_stride + b * 4);
        for (size_t q = 0; q < quads; q++, w += stride, d += kSums * 4) {
            const uint8x16_t digits = vld1q_u8(d);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const int8x16_t weights = vld1q_s8(w + b * 16);
                sum[0][b] = dot<0>(sum[0][b], weights, digits);
                sum[1][b] = dot<1>(sum[1][b], weights, digits);
                sum[2][b] = dot<2>(sum[2][b], weights, digits);
                sum[3][b] = dot<3>(sum[3][b], weights, digits);
#ifndef SLIP_I8MM
                const uint8x16_t last = vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(d + 16)));
                sum[4][b] = dot<0>(sum[4][b], weights, last);
#endif
            }
        }
        for (size_t j = 0; j < kSums; j++)
            for (int b = 0; b < 4; b++) vst1q_s32(acc + j * digit_stride + b * 4, sum[j][b]);
    }
};
}  // namespace

#include "loops.h"

namespace slip {
#ifdef SLIP_I8MM
extern constinit const Isa kI8mm = make("i8mm", [] {
#if defined(__linux__)
    return bool(getauxval(AT_HWCAP2) >> 13 & 1);
#elif defined(__APPLE__)
    return feature("hw.optional.arm.FEAT_I8MM");
#else
    return false;
#endif
});
#else
extern constinit const Isa kDotprod = make("dotprod", [] {
#if defined(__linux__)
    return bool(getauxval(AT_HWCAP) >> 20 & 1);
#elif defined(__APPLE__)
    return feature("hw.optional.arm.FEAT_DotProd");
#else
    return false;
#endif
});
#endif
}  // namespace slip
