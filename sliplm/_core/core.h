// What the parts of the native core share: the field, the packed layout, one table of functions per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace slip {

constexpr uint32_t P = 0x7FFFFFFF;  // 2^31 - 1

// Packed weights: [group of up to 4 row blocks][quad of 4 columns][row block][16 rows][4 columns]. So 64 consecutive
// bytes hold 16 rows x 4 columns; the four digits they meet are one broadcast; and a product reads the matrix once, front
// to back (where a tile does so, prefetching by hand makes it slower).
constexpr size_t kRows = 16, kQuad = 4, kBlocks = 4, kGroup = kRows * kBlocks;

constexpr size_t kTokens = 48;  // tokens that share one pass over a group's weights
constexpr size_t kMaxSums = 5;

// A secret change of basis of n values, four rounds (sliplm/split/blinding.py): permutations (4, n), cosines and sines
// (4, 2, n / 2), the diagonal (n). Null pointers leave the basis as it is.
struct Blinding {
    static constexpr size_t kRounds = 4;
    const int32_t* perm = nullptr;
    const float* turns = nullptr;
    const float* diagonal = nullptr;
};

// Vectors of field elements for the check, (count, length of a row); at most kMaxChecks.
struct Checks {
    const uint32_t* vectors;
    size_t count;
};
constexpr size_t kMaxChecks = 4, kMaxPlanes = 4;
constexpr size_t kColumns = 64;  // of a trusted factor that lie together: a product reads them front to back
constexpr size_t kTogether = 8;  // rows that the arithmetic of an exchange takes side by side

// One instruction set. Every function is exact, whatever the set. They are references, so that none can be left out.
struct Isa {
    const char* name;
    bool (&supported)();
    // An x is split into digits, as many and as wide as the set multiplies exactly: `quad_bytes` are those of four x.
    // A row of the matrix has so many `sums`.
    size_t quad_bytes, sums;

    // Digits of x (n values): out[quad][digit][4], zero-padded to whole quads.
    void (&split)(const uint32_t* x, size_t n, uint8_t* out);
    // One group (`blocks` row blocks) times `tokens` tokens over `quads` quads, added to
    // acc[token][sum][blocks * 16].
    void (&multiply)(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t tokens, size_t quads,
                     int32_t* acc);
    // acc[sum][stride] recombined modulo p into out[rows].
    void (&combine)(const int32_t* acc, size_t stride, size_t rows, uint32_t* out);

    bool (&canonical)(const uint32_t* x, size_t n);
    // out (n) = the low 31 bits of words; the largest of them.
    uint32_t (&low_bits)(const uint32_t* words, size_t n, uint32_t* out);
    uint32_t (&dot)(const uint32_t* u, const uint32_t* y, size_t n);
    // acc[k] += u * q[k] for n columns.
    void (&project)(uint32_t u, const int8_t* q, size_t n, int64_t* acc);
    // `tokens` rows. `scratch` is 2 n floats for each of up to kTogether rows. A row's result does not depend on the
    // rows beside it. encode returns false if x is not finite; expected (tokens, checks).
    bool (&encode)(const float* x, const uint32_t* r, size_t tokens, size_t n, double length, const Blinding& blinding,
                   const Checks& checks, float* scratch, uint32_t* masked, double* inv_c, uint32_t* expected);
    // Added to what `out` holds; false if the check fails or something is not canonical.
    bool (&decode)(const uint32_t* answer, const uint32_t* image, size_t tokens, const float* scales, size_t planes,
                   size_t n, const double* inv_c, const Blinding& blinding, const Checks& checks,
                   const uint32_t* expected, float* scratch, float* out);

    // y (tokens, columns) += x (tokens, n) w (n, columns), rows of x and y so many values apart. w is float32, or
    // bfloat16, and lies in blocks of kColumns columns, the last one of what is left, each (n, its columns). A row's
    // result does not depend on the rows beside it.
    void (&product32)(const float* x, size_t x_step, size_t tokens, size_t n, const float* w, size_t columns, float* y,
                      size_t y_step);
    void (&product16)(const float* x, size_t x_step, size_t tokens, size_t n, const uint16_t* w, size_t columns,
                      float* y, size_t y_step);
    // out (n) = x / rms(x) * weight.
    void (&rms_norm)(const float* x, const float* weight, size_t n, double eps, float* out);
    // In place: heads x size values turned by cos and sin (size).
    void (&rotate)(float* x, size_t heads, size_t size, const float* cos, const float* sin);
    // out (n) = silu(gate) * up.
    void (&gated)(const float* gate, const float* up, size_t n, float* out);
    // `heads` query heads (size each) against the same `count` keys and values, which are so many floats apart: out
    // (heads, size). `scores` is scratch: 4 (count + 16).
    void (&attend)(const float* q, size_t heads, const float* keys, const float* values, size_t count, size_t size,
                   size_t key_step, size_t value_step, float scale, float* scores, float* out);
};

}  // namespace slip
