// Sums that several loops take.
#pragma once
#include <cstddef>

namespace slip {
namespace {

// The squared length of x (n,), in double precision.
inline double squared_length(const float* x, size_t n) {
    double part[8] = {};  // several sums, or the loop waits for one addition after the other
    const size_t even = n & ~size_t(7);
    for (size_t i = 0; i < even; i += 8)
        for (int k = 0; k < 8; k++) part[k] += double(x[i + k]) * x[i + k];
    for (size_t i = even; i < n; i++) part[0] += double(x[i]) * x[i];
    double square = 0;
    for (double s : part) square += s;
    return square;
}

}  // namespace
}  // namespace slip
