// A decoder layer's own operations for a decoding step (sliplm/trusted/decoder.py), and the trusted part of a group.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "core.h"
#include "isas.h"
#include "pool.h"

namespace slip {
namespace {

template <class W>
auto& product(const Isa& isa) {
    if constexpr (sizeof(W) == 4)
        return isa.product32;
    else
        return isa.product16;
}

// A matrix (n, columns) in blocks of kColumns columns, as `Isa::product` takes it.
template <class W>
std::vector<W> blocked(const Matrix<const W>& w) {
    const size_t n = w.shape(0), columns = w.shape(1);
    std::vector<W> out(n * columns);
    W* to = out.data();
    for (size_t i = 0; i < columns; i += kColumns)
        for (size_t k = 0; k < n; k++)
            to = std::copy_n(w.data() + k * columns + i, std::min(kColumns, columns - i), to);
    return out;
}

// The trusted part of a group, A (B x) + b for T tokens: bt (K, ranks), its columns the members' B one after the other;
// each member's At (rank, rows), in float32 or as the bits of bfloat16; biases. It keeps copies.
template <class W>
class LowRank {
public:
    LowRank(Matrix<const W> bt, std::vector<Matrix<const W>> at, std::vector<std::optional<Vector<const float>>> bias)
        : columns_(bt.shape(0)), ranks_(bt.shape(1)), bt_(blocked(bt)) {
        require(at.size() == bias.size(), "as many biases as members are needed");
        size_t ranks = 0;
        for (size_t i = 0; i < at.size(); i++) {
            const size_t rank = at[i].shape(0), rows = at[i].shape(1);
            require(!bias[i] || bias[i]->shape(0) == rows, "a bias has the wrong size");
            std::vector<float> first(rows);
            if (bias[i]) std::copy_n(bias[i]->data(), rows, first.begin());
            members_.push_back({rank, blocked(at[i]), std::move(first)});
            ranks += rank;
            rows_ += rows;
            products_ += rank * rows;
        }
        require(ranks <= ranks_, "the ranks do not fit the width");
    }

    void apply(Matrix<const float> x, Matrix<float> out, const std::string& isa) const {
        const size_t tokens = x.shape(0), n = columns_;
        require(x.shape(1) == n && out.shape(0) == tokens && out.shape(1) == rows_, "shapes do not match");
        const Isa& use = named(isa);
        nb::gil_scoped_release release;
        const size_t threads = threads_for(tokens * (n * ranks_ + products_), 1 << 19);
        const size_t step = std::clamp<size_t>((tokens + threads - 1) / threads, 1, kMost);
        parallel((tokens + step - 1) / step, threads, [&](size_t i) {
            const size_t t = i * step;
            some(use, x.data() + t * n, std::min(step, tokens - t), out.data() + t * rows_);
        });
    }

    static void bind(nb::module_& m, const char* name) {
        nb::class_<LowRank>(m, name)
            .def(nb::init<Matrix<const W>, std::vector<Matrix<const W>>,
                          std::vector<std::optional<Vector<const float>>>>(),
                 "bt"_a, "at"_a, "bias"_a)
            .def("apply", &LowRank::apply, "x"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    }

private:
    static constexpr size_t kMost = 32;  // tokens for which the factors are read once; few enough for the cache

    struct Member {
        size_t rank;
        std::vector<W> at;
        std::vector<float> bias;
    };

    void some(const Isa& isa, const float* x, size_t tokens, float* out) const {
        float* low = scratch(tokens * ranks_);
        std::memset(low, 0, tokens * ranks_ * sizeof *low);
        product<W>(isa)(x, columns_, tokens, columns_, bt_.data(), ranks_, low, ranks_);
        for (const Member& m : members_) {
            const size_t rows = m.bias.size();
            for (size_t t = 0; t < tokens; t++) std::memcpy(out + t * rows_, m.bias.data(), rows * sizeof *out);
            product<W>(isa)(low, ranks_, tokens, m.rank, m.at.data(), rows, out, rows_);
            out += rows;
            low += m.rank;
        }
    }

    size_t columns_, ranks_, rows_ = 0, products_ = 0;
    std::vector<W> bt_;
    std::vector<Member> members_;
};

void rms_norm(Matrix<const float> x, Vector<const float> weight, double eps, Matrix<float> out,
              const std::string& isa) {
    const size_t n = x.shape(1);
    require(weight.shape(0) == n && out.shape(0) == x.shape(0) && out.shape(1) == n, "shapes do not match");
    for (size_t t = 0; t < x.shape(0); t++)
        named(isa).rms_norm(x.data() + t * n, weight.data(), n, eps, out.data() + t * n);
}

void rotate(Strided<float, 3> heads, Matrix<const float> cos, Matrix<const float> sin, const std::string& isa) {
    const size_t rows = heads.shape(0), size = heads.shape(2);
    require(is_dense(heads) && cos.shape(1) == size && sin.shape(1) == size && size % 2 == 0 &&
                (cos.shape(0) == 1 || cos.shape(0) == rows) && sin.shape(0) == cos.shape(0),
            "shapes do not match");
    for (size_t b = 0; b < rows; b++) {
        const size_t at = cos.shape(0) == 1 ? 0 : b * size;
        named(isa).rotate(&heads(b, 0, 0), heads.shape(1), size, cos.data() + at, sin.data() + at);
    }
}

void gated(Matrix<const float> both, Matrix<float> out, const std::string& isa) {
    const size_t n = out.shape(1);
    require(both.shape(0) == out.shape(0) && both.shape(1) == 2 * n, "shapes do not match");
    for (size_t t = 0; t < out.shape(0); t++) {
        const float* gate = both.data() + t * 2 * n;
        named(isa).gated(gate, gate + n, n, out.data() + t * n);
    }
}

// Where the keys begin that each sequence sees, if it sees all from there on; false if a mask (B, S) says anything else.
bool first_seen(Strided<const bool, 2> mask, Vector<int64_t> out) {
    require(out.shape(0) == mask.shape(0), "shapes do not match");
    for (size_t b = 0; b < mask.shape(0); b++) {
        size_t first = 0, s = mask.shape(1);
        while (first < s && !mask(b, first)) first++;
        while (s > first && mask(b, s - 1)) s--;
        if (s != first || first == mask.shape(1)) return false;
        out(b) = int64_t(first);
    }
    return true;
}

// queries (B, H, D) against keys and values (B, G, S, D), H / G query heads to each of the G, sequence b's from
// starts(b) on: out (B, H, D).
void attend(Strided<const float, 3> queries, Strided<const float, 4> keys, Strided<const float, 4> values,
            std::optional<Vector<const int64_t>> starts, float scale, Cube<float> out, const std::string& isa) {
    const size_t rows = queries.shape(0), heads = queries.shape(1), size = queries.shape(2), groups = keys.shape(1),
                 count = keys.shape(2);
    bool fits = groups && heads % groups == 0 && count && is_dense(queries) && (!starts || starts->shape(0) == rows);
    for (const auto* t : {&keys, &values})
        fits = fits && t->shape(0) == rows && t->shape(1) == groups && t->shape(2) == count && t->shape(3) == size &&
               (size == 1 || t->stride(3) == 1);
    require(fits && out.shape(0) == rows && out.shape(1) == heads && out.shape(2) == size, "shapes do not match");
    for (size_t b = 0; starts && b < rows; b++)
        require((*starts)(b) >= 0 && size_t((*starts)(b)) < count, "a sequence starts outside its keys");
    const Isa& use = named(isa);
    nb::gil_scoped_release release;
    parallel(rows * groups, threads_for(rows * heads * count * size, 1 << 19), [&](size_t task) {
        const size_t b = task / groups, g = task % groups, first = starts ? size_t((*starts)(b)) : 0;
        const size_t shared = heads / groups;
        std::unique_ptr<float[]> scores(new float[4 * (count - first + 16)]);
        use.attend(&queries(b, g * shared, 0), shared, &keys(b, g, first, 0), &values(b, g, first, 0), count - first,
                   size, keys.stride(2), values.stride(2), scale, scores.get(), &out(b, g * shared, 0));
    });
}

// The rows of one pass: row r is the token at positions[r] of sequence owners[r], whose keys and values (L, 2, G, S, D)
// have memory of their own. It refers to the arrays that it is given.
class Ragged {
public:
    using Memory = nb::ndarray<float, nb::ndim<5>, nb::c_contig, nb::device::cpu>;

    Ragged(std::vector<Memory> memories, Vector<const int64_t> owners, Vector<const int64_t> positions)
        : memories_(std::move(memories)), owners_(std::move(owners)), positions_(std::move(positions)) {
        require(!memories_.empty() && owners_.shape(0) == positions_.shape(0), "shapes do not match");
        for (const Memory& m : memories_)
            require(m.shape(0) == layers() && m.shape(1) == 2 && m.shape(2) == groups() && m.shape(4) == size(),
                    "shapes do not match");
        for (size_t r = 0; r < rows(); r++) {
            require(owners_(r) >= 0 && size_t(owners_(r)) < memories_.size(), "a row is of no sequence");
            require(positions_(r) >= 0 && size_t(positions_(r)) < memories_[owners_(r)].shape(3),
                    "a position is outside its memory");
            work_ += positions_(r) + 1;
        }
    }

    // heads (N, H + 2 G, D) are the rows' queries, keys and values, side by side. Writes keys and values where they
    // belong; then out (N, H, D) is what each row sees of its sequence up to itself.
    void attend(size_t layer, Cube<const float> heads, float scale, Cube<float> out, const std::string& isa) {
        const size_t queries = out.shape(1), groups = this->groups(), size = this->size();
        require(layer < layers() && groups && queries && queries % groups == 0 && heads.shape(0) == rows() &&
                    out.shape(0) == rows() && heads.shape(1) == queries + 2 * groups && heads.shape(2) == size &&
                    out.shape(2) == size,
                "shapes do not match");
        const Isa& use = named(isa);
        nb::gil_scoped_release release;
        for (size_t r = 0; r < rows(); r++)
            for (size_t part = 0; part < 2; part++)
                for (size_t g = 0; g < groups; g++)
                    std::memcpy(at(r, layer, part, g) + positions_(r) * size, &heads(r, queries + part * groups + g, 0),
                                size * sizeof(float));
        const size_t shared = queries / groups;
        parallel(rows() * groups, threads_for(work_ * queries * size, 1 << 19), [&](size_t task) {
            const size_t r = task / groups, g = task % groups, count = positions_(r) + 1;
            std::unique_ptr<float[]> scores(new float[4 * (count + 16)]);
            use.attend(&heads(r, g * shared, 0), shared, at(r, layer, 0, g), at(r, layer, 1, g), count, size, size,
                       size, scale, scores.get(), &out(r, g * shared, 0));
        });
    }

private:
    size_t rows() const { return owners_.shape(0); }
    size_t layers() const { return memories_[0].shape(0); }
    size_t groups() const { return memories_[0].shape(2); }
    size_t size() const { return memories_[0].shape(4); }
    float* at(size_t row, size_t layer, size_t part, size_t group) const {
        return &memories_[owners_(row)](layer, part, group, 0, 0);
    }

    std::vector<Memory> memories_;
    Vector<const int64_t> owners_, positions_;
    size_t work_ = 0;  // keys that all rows see
};

}  // namespace

void bind_decoder(nb::module_& m) {
    LowRank<float>::bind(m, "LowRank32");
    LowRank<uint16_t>::bind(m, "LowRank16");
    nb::class_<Ragged>(m, "Ragged")
        .def(nb::init<std::vector<Ragged::Memory>, Vector<const int64_t>, Vector<const int64_t>>(), "memories"_a,
             "owners"_a, "positions"_a)
        .def("attend", &Ragged::attend, "layer"_a, "heads"_a.noconvert(), "scale"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("rotate", &rotate, "heads"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "isa"_a = "");
    m.def("gated", &gated, "both"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    m.def("first_seen", &first_seen, "mask"_a.noconvert(), "out"_a.noconvert());
    m.def("attend", &attend, "queries"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "starts"_a.noconvert().none(), "scale"_a, "out"_a.noconvert(), "isa"_a = "");
}

}  // namespace slip
