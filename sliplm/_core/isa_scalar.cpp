// Plain C++: runs anywhere.
#include "core.h"

namespace {
struct Ops {
    static constexpr size_t kSums = 4, kShift = 8, kQuadBytes = 16, kTokenTile = 1;
    static constexpr int kRowTile(int) { return 1; }
    static constexpr size_t kQuadsAtOnce(size_t) { return 512; }
    static constexpr size_t kFetched = 0;

    template <int R, int T>
    static void tile(const int8_t* w, size_t stride, const uint8_t* d, size_t, size_t quads, int32_t* acc, size_t,
                     size_t digit_stride) {
        for (size_t q = 0; q < quads; q++, w += stride, d += kSums * 4)
            for (size_t j = 0; j < kSums; j++)
                for (size_t i = 0; i < 16; i++)
                    for (size_t k = 0; k < 4; k++) acc[j * digit_stride + i] += w[i * 4 + k] * int32_t(d[j * 4 + k]);
    }
};
}  // namespace

#include "loops.h"

namespace slip {
extern constinit const Isa kScalar = make("scalar", [] { return true; });
}  // namespace slip
