// A packed matrix and its exact products.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arrays.h"
#include "core.h"
#include "isas.h"
#include "pool.h"

namespace slip {
namespace {

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
            for (size_t k = 0; k + kQuad <= cols_; k += kQuad, to += blocks * kRows * kQuad)
                std::memcpy(to, row + k, kQuad);
            std::memcpy(to, row + cols_ / kQuad * kQuad, cols_ % kQuad);
        }
    }

    void some(const uint32_t* x, size_t tokens, uint32_t* out, size_t threads) const {
        const size_t token_bytes = quads_ * isa_.quad_bytes;
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
        alignas(64) int32_t acc[kTokens * kMaxSums * kGroup];
        const size_t blocks = blocks_in(group), width = blocks * kRows, step = isa_.sums * width;
        std::memset(acc, 0, tokens * step * sizeof *acc);
        isa_.multiply(weights_.get() + offset(group), blocks, digits, token_bytes, tokens, quads_, acc);
        const size_t first = group * kGroup;
        for (size_t t = 0; t < tokens; t++)
            isa_.combine(acc + t * step, width, std::min(width, rows_ - first), out + t * rows_ + first);
    }

    const Isa& isa_;
    size_t rows_, cols_, quads_, blocks_;
    std::unique_ptr<int8_t[], Free> weights_;
};

}  // namespace

void bind_product(nb::module_& m) {
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def(nb::init<Matrix<const int8_t>, const std::string&>(), "q"_a, "isa"_a = "")
        .def("product", &PackedMatrix::product, "x"_a.noconvert(), "out"_a.noconvert(), "threads"_a = 0)
        .def_prop_ro("nbytes", &PackedMatrix::nbytes);
}

}  // namespace slip
