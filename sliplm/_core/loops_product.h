// Products with packed weights: digits, the walk over tiles, recombination modulo p.
#pragma once
#include "core.h"

namespace slip {
namespace {

template <class O>
void split(const uint32_t* x, size_t n, uint8_t* out) {
    if constexpr (requires { O::split(x, n, out); }) return O::split(x, n, out);
    constexpr uint32_t mask = (1u << Ops::kShift) - 1;
    const size_t whole = n / kQuad;
    for (size_t q = 0; q < whole; q++)
        for (size_t j = 0; j < Ops::kSums; j++)
            for (size_t k = 0; k < kQuad; k++)
                out[(q * Ops::kSums + j) * kQuad + k] = uint8_t(x[q * kQuad + k] >> (Ops::kShift * j) & mask);
    for (size_t k = 0; n % kQuad && k < kQuad; k++) {
        const uint32_t value = whole * kQuad + k < n ? x[whole * kQuad + k] : 0;
        for (size_t j = 0; j < Ops::kSums; j++)
            out[(whole * Ops::kSums + j) * kQuad + k] = uint8_t(value >> (Ops::kShift * j) & mask);
    }
}

template <int R, int T>
inline void tile(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t quads, int32_t* acc) {
    Ops::template tile<R, T>(w, blocks * kRows * kQuad, d, token_bytes, quads, acc, Ops::kSums * blocks * kRows,
                             blocks * kRows);
}

// A tile skips the blocks beside its own, and the hardware foresees steps that skip badly. So each tile first asks for as
// many bytes of what follows these quads as it reads itself, front to back; beyond the matrix that does nothing.
template <int R>
inline void fetch(const int8_t* w, size_t blocks, size_t block, size_t quads) {
    const int8_t* next = w + (blocks + block) * quads * kRows * kQuad;
    for (size_t line = 0; line < R * quads; line++) __builtin_prefetch(next + line * kRows * kQuad);
}

template <int T>
inline void rows(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t quads, int32_t* acc) {
    constexpr int R = Ops::kRowTile(T);
    const bool fetches = quads <= Ops::kFetched;
    size_t b = 0;
    for (; b + R <= blocks; b += R) {
        if (fetches) fetch<R>(w, blocks, b, quads);
        tile<R, T>(w + b * kRows * kQuad, blocks, d, token_bytes, quads, acc + b * kRows);
    }
    for (; b < blocks; b++) tile<1, T>(w + b * kRows * kQuad, blocks, d, token_bytes, quads, acc + b * kRows);
}

inline void some(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t tokens, size_t quads,
                 int32_t* acc) {
    constexpr size_t T = Ops::kTokenTile;
    const size_t step = Ops::kSums * blocks * kRows;
    size_t t = 0;
    if constexpr (T > 1) {
        for (; t + T <= tokens && tokens - t != T + 1; t += T)  // two pairs rather than T and a straggler
            rows<T>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
        for (; t + 2 <= tokens; t += 2) rows<2>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
    }
    for (; t < tokens; t++) rows<1>(w, blocks, d + t * token_bytes, token_bytes, quads, acc + t * step);
}

void multiply(const int8_t* w, size_t blocks, const uint8_t* d, size_t token_bytes, size_t tokens, size_t quads,
              int32_t* acc) {
    const size_t step = Ops::kQuadsAtOnce(tokens);
    for (size_t q = 0; q < quads; q += step)
        some(w + q * blocks * kRows * kQuad, blocks, d + q * Ops::kQuadBytes, token_bytes, tokens,
             quads - q < step ? quads - q : step, acc);
}

void combine(const int32_t* acc, size_t stride, size_t rows, uint32_t* out) {
    for (size_t i = 0; i < rows; i++) {
        int64_t sum = int64_t(P) << 30;  // a multiple of p that makes the sum, above -2^60, positive
        for (size_t j = 0; j < Ops::kSums; j++) sum += int64_t(acc[j * stride + i]) * (int64_t(1) << (Ops::kShift * j));
        uint64_t z = uint64_t(sum);
        z = (z & P) + (z >> 31);
        z = (z & P) + (z >> 31);
        out[i] = uint32_t(z >= P ? z - P : z);
    }
}

}  // namespace
}  // namespace slip
