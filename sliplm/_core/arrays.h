// What the bindings share: numpy arrays as they come, without copies, and what is wrong with them as a ValueError.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

namespace slip {

namespace nb = nanobind;
using namespace nb::literals;

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Cube = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N>
using Strided = nb::ndarray<T, nb::ndim<N>, nb::device::cpu>;

// Whether the rows (H, D) of each of an array's matrices (B, H, D) follow each other.
template <class T>
bool is_dense(const Strided<T, 3>& t) {
    return (t.shape(2) == 1 || t.stride(2) == 1) && (t.shape(1) == 1 || t.stride(1) == int64_t(t.shape(2)));
}

inline void require(bool condition, const char* sentence) {
    if (!condition) throw std::invalid_argument(sentence);
}

}  // namespace slip
