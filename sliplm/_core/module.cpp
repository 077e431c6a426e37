// The Python module: packed matrices, and the trusted side's arithmetic, over numpy arrays without copies, GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <poll.h>
#include <sched.h>

#include <chrono>

#include "core.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace slip {
namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Cube = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* sentence) {
    if (!condition) throw std::invalid_argument(sentence);
}

const Isa& find(const std::string& name) {
    for (const Isa* const* isa = kIsas; *isa; isa++)
        if ((name.empty() || name == (*isa)->name) && (*isa)->supported()) return **isa;
    throw std::invalid_argument("this machine cannot run the instruction set " + name);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa* const* isa = kIsas; *isa; isa++)
        if ((*isa)->supported()) names.emplace_back((*isa)->name);
    return names;
}

const Isa& best() {
    static const Isa& isa = find("");
    return isa;
}

const Isa& named(const std::string& name) { return name.empty() ? best() : find(name); }

// So many threads that each has something like 20 microseconds to do; waking one costs a few.
size_t threads_for(size_t work, size_t each) { return std::clamp<size_t>(work / each, 1, cores()); }

class PackedMatrix {
public:
    PackedMatrix(Matrix<const int8_t> q, const std::string& isa)
        : isa_(named(isa)), rows_(q.shape(0)), cols_(q.shape(1)), quads_((cols_ + kQuad - 1) / kQuad) {
        require(rows_ && cols_, "the matrix is empty");
        require(cols_ < 65536, "exact 32-bit sums need fewer than 65536 columns");
        blocks_ = (rows_ + kRows - 1) / kRows;
        constexpr size_t huge = size_t(1) << 21;  // large pages, where there are some, save a tenth of a pass
        const size_t alignment = nbytes() >= 4 * huge ? huge : 64;
        const size_t size = (nbytes() + alignment - 1) / alignment * alignment;
        weights_.reset(static_cast<int8_t*>(std::aligned_alloc(alignment, size)));
        if (!weights_) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == huge) madvise(weights_.get(), size, MADV_HUGEPAGE);
#endif
        nb::gil_scoped_release release;
        const int8_t* source = q.data();
        parallel(groups(), threads_for(nbytes(), 1 << 18), [&](size_t g) { pack(source, g); });
    }

    // out (T, rows) = Q x_t mod p; exact for any 32-bit values, whether canonical or not.
    void product(Matrix<const uint32_t> x, Matrix<uint32_t> out, size_t threads) const {
        require(x.shape(1) == cols_, "x has the wrong number of columns");
        require(out.shape(0) == x.shape(0) && out.shape(1) == rows_, "out has the wrong shape");
        nb::gil_scoped_release release;
        constexpr size_t step = 4 * kTokens;  // bounds the memory for digits
        for (size_t t = 0; t < x.shape(0); t += step)
            some(x.data() + t * cols_, std::min(step, x.shape(0) - t), out.data() + t * rows_, threads);
    }

    size_t nbytes() const { return blocks_ * quads_ * kRows * kQuad; }
    const char* isa() const { return isa_.name; }

private:
    struct Free {
        void operator()(int8_t* memory) const { std::free(memory); }
    };

    size_t groups() const { return (blocks_ + kBlocks - 1) / kBlocks; }
    size_t blocks_in(size_t group) const { return std::min(kBlocks, blocks_ - group * kBlocks); }
    size_t offset(size_t group) const { return group * kBlocks * quads_ * kRows * kQuad; }

    void pack(const int8_t* q, size_t group) const {
        const size_t blocks = blocks_in(group), first = group * kGroup;
        int8_t* out = weights_.get() + offset(group);
        std::memset(out, 0, blocks * quads_ * kRows * kQuad);
        for (size_t i = 0; i < blocks * kRows && first + i < rows_; i++) {
            const int8_t* row = q + (first + i) * cols_;
            int8_t* to = out + i * kQuad;
            for (size_t k = 0; k + kQuad <= cols_; k += kQuad, to += blocks * kRows * kQuad) std::memcpy(to, row + k, kQuad);
            std::memcpy(to, row + cols_ / kQuad * kQuad, cols_ % kQuad);
        }
    }

    void some(const uint32_t* x, size_t tokens, uint32_t* out, size_t threads) const {
        const size_t token_bytes = quads_ * isa_.digits * kQuad;
        const size_t most = threads_for(nbytes() * (1 + tokens / 8), 1 << 17);
        threads = threads ? std::min(threads, most) : most;
        std::unique_ptr<uint8_t[]> digits(new uint8_t[tokens * token_bytes]);
        parallel(tokens, tokens * cols_ < 65536 ? 1 : threads,
                 [&](size_t t) { isa_.split(x + t * cols_, cols_, digits.get() + t * token_bytes); });
        // Few enough tasks to hand out cheaply, enough to even out threads that start late or are interrupted.
        const size_t rounds = (tokens + kTokens - 1) / kTokens;
        const size_t run = std::max<size_t>(1, groups() / (32 * threads));
        const size_t runs = (groups() + run - 1) / run;
        parallel(runs * rounds, threads, [&](size_t task) {
            const size_t t = task % rounds * kTokens, begin = task / rounds * run;
            const size_t count = std::min(kTokens, tokens - t);
            for (size_t g = begin; g < std::min(begin + run, groups()); g++)
                one(g, digits.get() + t * token_bytes, token_bytes, count, out + t * rows_);
        });
    }

    void one(size_t group, const uint8_t* digits, size_t token_bytes, size_t tokens, uint32_t* out) const {
        alignas(64) int32_t acc[kTokens * kMaxDigits * kGroup];
        const size_t blocks = blocks_in(group), width = blocks * kRows, step = isa_.digits * width;
        std::memset(acc, 0, tokens * step * sizeof *acc);
        for (size_t q = 0; q < quads_; q += kQuadsAtOnce)
            isa_.multiply(weights_.get() + offset(group) + q * width * kQuad, blocks, digits + q * isa_.digits * kQuad,
                          token_bytes, tokens, std::min(kQuadsAtOnce, quads_ - q), acc);
        const size_t first = group * kGroup;
        for (size_t t = 0; t < tokens; t++)
            isa_.combine(acc + t * step, width, std::min(width, rows_ - first), out + t * rows_ + first);
    }

    const Isa& isa_;
    size_t rows_, cols_, quads_, blocks_;
    std::unique_ptr<int8_t[], Free> weights_;
};

bool is_canonical(Vector<const uint32_t> x) {
    nb::gil_scoped_release release;
    return best().canonical(x.data(), x.shape(0));
}

// Whether the socket `fd` has something to read (or an end, or an error) within so many microseconds. Asks again and
// again instead of sleeping: waking a thread on an idle core costs more than most exchanges last. Gives way to others.
bool wait_readable(int fd, double microseconds) {
    nb::gil_scoped_release release;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double, std::micro>(microseconds);
    for (;;) {
        pollfd one{fd, POLLIN, 0};
        if (poll(&one, 1, 0) != 0) return true;
        if (std::chrono::steady_clock::now() >= deadline) return false;
        sched_yield();
    }
}

void shrink(const Isa& isa, const float* x, size_t n, const float* bt, size_t width, float* low) {
    isa.shrink32(x, n, bt, width, low);
}
void shrink(const Isa& isa, const float* x, size_t n, const uint16_t* bt, size_t width, float* low) {
    isa.shrink16(x, n, bt, width, low);
}
void expand(const Isa& isa, const float* low, size_t rank, const float* at, size_t n, float* out) {
    isa.expand32(low, rank, at, n, out);
}
void expand(const Isa& isa, const float* low, size_t rank, const uint16_t* at, size_t n, float* out) {
    isa.expand16(low, rank, at, n, out);
}

// The trusted part of a group, A (B x) + b for one token: bt (K, width), its columns the members' B one after the
// other and then zeros up to a multiple of 16; each member's At (rank, rows), in float32 or as the bits of bfloat16; biases. It refers to the arrays that it is given.
template <class W>
class LowRank {
public:
    LowRank(Matrix<const W> bt, std::vector<Matrix<const W>> at, std::vector<std::optional<Vector<const float>>> bias)
        : bt_(std::move(bt)), at_(std::move(at)), bias_(std::move(bias)) {
        require(at_.size() == bias_.size(), "as many biases as members are needed");
        size_t ranks = 0;
        for (size_t i = 0; i < at_.size(); i++) {
            require(!bias_[i] || bias_[i]->shape(0) == at_[i].shape(1), "a bias has the wrong size");
            ranks += at_[i].shape(0);
            rows_ += at_[i].shape(1);
        }
        require(ranks <= bt_.shape(1) && bt_.shape(1) % 16 == 0, "the ranks do not fit the width");
    }

    void apply(Vector<const float> x, Vector<float> out, const std::string& isa) const {
        require(x.shape(0) == bt_.shape(0) && out.shape(0) == rows_, "shapes do not match");
        const Isa& use = named(isa);
        nb::gil_scoped_release release;
        std::vector<float> low(bt_.shape(1));
        shrink(use, x.data(), x.shape(0), bt_.data(), bt_.shape(1), low.data());
        float* y = out.data();
        const float* l = low.data();
        for (size_t i = 0; i < at_.size(); i++) {
            const size_t rank = at_[i].shape(0), rows = at_[i].shape(1);
            if (bias_[i])
                std::memcpy(y, bias_[i]->data(), rows * sizeof *y);
            else
                std::memset(y, 0, rows * sizeof *y);
            expand(use, l, rank, at_[i].data(), rows, y);
            y += rows;
            l += rank;
        }
    }

    static void bind(nb::module_& m, const char* name) {
        nb::class_<LowRank>(m, name)
            .def(nb::init<Matrix<const W>, std::vector<Matrix<const W>>, std::vector<std::optional<Vector<const float>>>>(),
                 "bt"_a, "at"_a, "bias"_a)
            .def("apply", &LowRank::apply, "x"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    }

private:
    Matrix<const W> bt_;
    std::vector<Matrix<const W>> at_;
    std::vector<std::optional<Vector<const float>>> bias_;
    size_t rows_ = 0;
};

void rms_norm(Matrix<const float> x, Vector<const float> weight, double eps, Matrix<float> out, const std::string& isa) {
    const size_t n = x.shape(1);
    require(weight.shape(0) == n && out.shape(0) == x.shape(0) && out.shape(1) == n, "shapes do not match");
    for (size_t t = 0; t < x.shape(0); t++)
        named(isa).rms_norm(x.data() + t * n, weight.data(), n, eps, out.data() + t * n);
}

void rotate(Matrix<float> heads, Vector<const float> cos, Vector<const float> sin, const std::string& isa) {
    const size_t size = heads.shape(1);
    require(cos.shape(0) == size && sin.shape(0) == size && size % 2 == 0, "shapes do not match");
    named(isa).rotate(heads.data(), heads.shape(0), size, cos.data(), sin.data());
}

// queries (H, D) against keys and values (G, S, D), H / G query heads to each of the G: out (H, D).
void attend(Matrix<const float> queries, Cube<const float> keys, Cube<const float> values, float scale, Matrix<float> out,
            const std::string& isa) {
    const size_t heads = queries.shape(0), size = queries.shape(1), groups = keys.shape(0), count = keys.shape(1);
    require(groups && heads % groups == 0 && count && keys.shape(2) == size && values.shape(0) == groups &&
                values.shape(1) == count && values.shape(2) == size && out.shape(0) == heads && out.shape(1) == size,
            "shapes do not match");
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    parallel(heads, threads_for(heads * count * size, 1 << 19), [&](size_t h) {
        const size_t from = h / (heads / groups) * count * size;
        std::unique_ptr<float[]> scores(new float[count]);
        use.attend(queries.data() + h * size, keys.data() + from, values.data() + from, count, size, scale, scores.get(),
                   out.data() + h * size);
    });
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

bool encode(Matrix<const float> x, Matrix<const uint32_t> r, double length, const BlindingArrays& blinding,
            Matrix<uint32_t> masked, Vector<double> inv_c, const std::string& isa) {
    const size_t tokens = x.shape(0), n = x.shape(1);
    require(r.shape(0) == tokens && r.shape(1) == n && masked.shape(0) == tokens && masked.shape(1) == n &&
                inv_c.shape(0) == tokens,
            "shapes do not match");
    const Blinding by = blinding_of(blinding, n);
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    std::atomic<bool> finite{true};
    parallel(tokens, threads_for(tokens * n, 1 << 14), [&](size_t t) {
        std::unique_ptr<float[]> v(new float[2 * n]);
        if (!use.encode(x.data() + t * n, r.data() + t * n, n, length, by, v.get(), masked.data() + t * n, inv_c.data() + t))
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

void decode(Matrix<const uint32_t> answer, Matrix<const uint32_t> image, Matrix<const float> scales,
            Vector<const double> inv_c, const BlindingArrays& blinding, Matrix<float> out, const std::string& isa) {
    const size_t tokens = answer.shape(0), rows = answer.shape(1), planes = scales.shape(0), n = scales.shape(1);
    require(rows == planes * n && image.shape(0) == tokens && image.shape(1) == rows && inv_c.shape(0) == tokens &&
                out.shape(0) == tokens && out.shape(1) == n,
            "shapes do not match");
    const Blinding by = blinding_of(blinding, n);
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    parallel(tokens, threads_for(tokens * rows, 1 << 15), [&](size_t t) {
        std::unique_ptr<float[]> v(new float[2 * n]);
        use.decode(answer.data() + t * rows, image.data() + t * rows, scales.data(), planes, n, inv_c.data()[t], by, v.get(),
                   out.data() + t * n);
    });
}

}  // namespace

#if defined(__x86_64__)
extern const Isa kAvx512, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Isa kI8mm, kDotprod;
#endif
extern const Isa kScalar;

const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
    &kI8mm, &kDotprod,
#endif
    &kScalar, nullptr};

}  // namespace slip

NB_MODULE(_native, m) {
    using namespace slip;
    m.def("isas", &isas);
    m.def("threads", &cores);
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def(nb::init<Matrix<const int8_t>, const std::string&>(), "q"_a, "isa"_a = "")
        .def("product", &PackedMatrix::product, "x"_a.noconvert(), "out"_a.noconvert(), "threads"_a = 0)
        .def_prop_ro("nbytes", &PackedMatrix::nbytes)
        .def_prop_ro("isa", &PackedMatrix::isa);
    LowRank<float>::bind(m, "LowRank32");
    LowRank<uint16_t>::bind(m, "LowRank16");
    m.def("rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("rotate", &rotate, "heads"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "isa"_a = "");
    m.def("attend", &attend, "queries"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "scale"_a,
          "out"_a.noconvert(), "isa"_a = "");
    m.def("wait_readable", &wait_readable, "fd"_a, "microseconds"_a);
    m.def("is_canonical", &is_canonical, "x"_a.noconvert());
    m.def("project", &project, "u"_a.noconvert(), "q"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    m.def("encode", &encode, "x"_a.noconvert(), "r"_a.noconvert(), "length"_a, "blinding"_a.none(),
          "masked"_a.noconvert(), "inv_c"_a.noconvert(), "isa"_a = "");
    m.def("verify", &verify, "u"_a.noconvert(), "uq"_a.noconvert(), "masked"_a.noconvert(), "answer"_a.noconvert(),
          "isa"_a = "");
    m.def("decode", &decode, "answer"_a.noconvert(), "image"_a.noconvert(), "scales"_a.noconvert(),
          "inv_c"_a.noconvert(), "blinding"_a.none(), "out"_a.noconvert(), "isa"_a = "");
}
