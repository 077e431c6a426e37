// The trusted arithmetic of an exchange, rows by rows on several threads.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "core.h"
#include "isas.h"
#include "pool.h"

namespace slip {
namespace {

bool is_canonical(Vector<const uint32_t> x) {
    nb::gil_scoped_release release;
    return named("").canonical(x.data(), x.shape(0));
}

// out (T, K) = the low 31 bits of words (T, K or more); whether any of them is p.
bool low_bits(Matrix<const uint32_t> words, Matrix<uint32_t> out, const std::string& isa) {
    const size_t rows = out.shape(0), width = out.shape(1);
    require(words.shape(0) == rows && words.shape(1) >= width, "shapes do not match");
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    uint32_t most = 0;
    for (size_t t = 0; t < rows; t++)
        most = std::max(most, use.low_bits(words.data() + t * words.shape(1), width, out.data() + t * width));
    return most == P;
}

// out (C, K) = u (C, M) q (M, K) mod p; |u q| < 2^38, so 2^24 rows fit 64-bit sums.
void project(Matrix<const uint32_t> u, Matrix<const int8_t> q, Matrix<uint32_t> out, const std::string& isa) {
    const size_t checks = u.shape(0), rows = q.shape(0), cols = q.shape(1);
    require(u.shape(1) == rows && out.shape(0) == checks && out.shape(1) == cols, "shapes do not match");
    require(rows < (size_t(1) << 24), "too many rows");
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    const size_t threads = threads_for(rows * cols, 1 << 18);
    const size_t width = std::clamp<size_t>((cols / threads + 63) / 64 * 64, 64, 1024);
    parallel((cols + width - 1) / width, threads, [&](size_t task) {
        const size_t k = task * width, n = std::min(width, cols - k);
        std::vector<int64_t> acc(checks * n);
        for (size_t m = 0; m < rows; m++)
            for (size_t i = 0; i < checks; i++)
                use.project(u.data()[i * rows + m], q.data() + m * cols + k, n, acc.data() + i * n);
        for (size_t i = 0; i < checks * n; i++) {
            const int64_t rest = acc[i] % int64_t(P);
            out.data()[i / n * cols + k + i % n] = uint32_t(rest < 0 ? rest + P : rest);
        }
    });
}

using BlindingArrays = std::optional<std::tuple<Matrix<const int32_t>, Cube<const float>, Vector<const float>>>;

Blinding blinding_of(const BlindingArrays& arrays, size_t n) {
    if (!arrays) return {};
    const auto& [perm, turns, diagonal] = *arrays;
    require(perm.shape(0) == Blinding::kRounds && perm.shape(1) == n && turns.shape(0) == Blinding::kRounds &&
                turns.shape(1) == 2 && turns.shape(2) == n / 2 && diagonal.shape(0) == n,
            "the blinding has the wrong size");
    return {perm.data(), turns.data(), diagonal.data()};
}

Checks checks_of(const Matrix<const uint32_t>& vectors, size_t n) {
    require(vectors.shape(0) <= kMaxChecks, "too many checks");
    require(vectors.shape(1) == n, "the check has the wrong size");
    return {vectors.data(), vectors.shape(0)};
}

// Calls task(first, count) for up to kTogether rows at a time, fewer where that employs more of the threads.
template <class Task>
void share(size_t tokens, size_t threads, Task task) {
    const size_t step = std::clamp<size_t>((tokens + threads - 1) / threads, 1, kTogether);
    parallel((tokens + step - 1) / step, threads, [&](size_t i) { task(i * step, std::min(step, tokens - i * step)); });
}

bool encode(Matrix<const float> x, Matrix<const uint32_t> r, double length, const BlindingArrays& blinding,
            Matrix<const uint32_t> uq, Matrix<uint32_t> masked, Vector<double> inv_c, Matrix<uint32_t> expected,
            const std::string& isa) {
    const size_t tokens = x.shape(0), n = x.shape(1);
    const Checks checks = checks_of(uq, n);
    require(r.shape(0) == tokens && r.shape(1) == n && masked.shape(0) == tokens && masked.shape(1) == n &&
                inv_c.shape(0) == tokens && expected.shape(0) == tokens && expected.shape(1) == checks.count,
            "shapes do not match");
    const Blinding by = blinding_of(blinding, n);
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    std::atomic<bool> finite{true};
    share(tokens, threads_for(tokens * n, 1 << 14), [&](size_t t, size_t count) {
        if (!use.encode(x.data() + t * n, r.data() + t * n, count, n, length, by, checks, scratch(2 * n * kTogether),
                        masked.data() + t * n, inv_c.data() + t, expected.data() + t * checks.count))
            finite = false;
    });
    return finite;
}

bool verify(Matrix<const uint32_t> u, Matrix<const uint32_t> uq, Matrix<const uint32_t> masked,
            Matrix<const uint32_t> answer, const std::string& isa) {
    const size_t checks = u.shape(0), rows = u.shape(1), cols = uq.shape(1), tokens = masked.shape(0);
    require(uq.shape(0) == checks && masked.shape(1) == cols && answer.shape(0) == tokens && answer.shape(1) == rows,
            "shapes do not match");
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    std::atomic<uint32_t> wrong{0};  // no early exit: the time taken says nothing about where an answer is wrong
    parallel(tokens, threads_for(tokens * checks * (rows + cols), 1 << 16), [&](size_t t) {
        const uint32_t *x = masked.data() + t * cols, *y = answer.data() + t * rows;
        uint32_t difference = !use.canonical(y, rows);
        for (size_t i = 0; i < checks; i++)
            difference |= use.dot(u.data() + i * rows, y, rows) ^ use.dot(uq.data() + i * cols, x, cols);
        wrong.fetch_or(difference);
    });
    return wrong == 0;
}

bool decode(Matrix<const uint32_t> answer, Matrix<const uint32_t> image, Matrix<const float> scales,
            Vector<const double> inv_c, const BlindingArrays& blinding, Matrix<const uint32_t> u,
            Matrix<const uint32_t> expected, Matrix<float> out, const std::string& isa) {
    const size_t tokens = answer.shape(0), rows = answer.shape(1), planes = scales.shape(0), n = scales.shape(1);
    const Checks checks = checks_of(u, rows);
    require(planes <= kMaxPlanes, "too many planes");
    require(rows == planes * n && image.shape(0) == tokens && image.shape(1) == rows && inv_c.shape(0) == tokens &&
                expected.shape(0) == tokens && expected.shape(1) == checks.count && out.shape(0) == tokens &&
                out.shape(1) == n,
            "shapes do not match");
    const Blinding by = blinding_of(blinding, n);
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    std::atomic<bool> right{true};  // no early exit, as in `verify`
    share(tokens, threads_for(tokens * rows, 1 << 14), [&](size_t t, size_t count) {
        if (!use.decode(answer.data() + t * rows, image.data() + t * rows, count, scales.data(), planes, n,
                        inv_c.data() + t, by, checks, expected.data() + t * checks.count, scratch(2 * n * kTogether),
                        out.data() + t * n))
            right = false;
    });
    return right;
}

}  // namespace

void bind_exchange(nb::module_& m) {
    m.def("is_canonical", &is_canonical, "x"_a.noconvert());
    m.def("low_bits", &low_bits, "words"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    m.def("project", &project, "u"_a.noconvert(), "q"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    m.def("encode", &encode, "x"_a.noconvert(), "r"_a.noconvert(), "length"_a, "blinding"_a.none(), "uq"_a.noconvert(),
          "masked"_a.noconvert(), "inv_c"_a.noconvert(), "expected"_a.noconvert(), "isa"_a = "");
    m.def("verify", &verify, "u"_a.noconvert(), "uq"_a.noconvert(), "masked"_a.noconvert(), "answer"_a.noconvert(),
          "isa"_a = "");
    m.def("decode", &decode, "answer"_a.noconvert(), "image"_a.noconvert(), "scales"_a.noconvert(),
          "inv_c"_a.noconvert(), "blinding"_a.none(), "u"_a.noconvert(), "expected"_a.noconvert(), "out"_a.noconvert(),
          "isa"_a = "");
}

}  // namespace slip
