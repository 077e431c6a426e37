// The loops that need no intrinsics, and the table of them. Included once per instruction set, after `Ops`, so that the
// compiler vectorises them for it. Everything is in an anonymous namespace and free of standard templates: code compiled
// for one instruction set must never be linked into another's callers.
//
// Ops provides: kSums, kShift (bits from one sum to the next), kQuadBytes, kRowTile, kTokenTile, kQuadsAtOnce,
// kFetched (while so many quads at most are multiplied, the next ones are fetched), and
//   template <int R, int T> tile(w, stride, d, token_bytes, quads, acc, token_stride, sum_stride)
// and split, unless its digits are bytes of kShift bits, one for each sum.
#pragma once
#include "core.h"
#include "loops_decoder.h"
#include "loops_exchange.h"
#include "loops_product.h"

namespace slip {
namespace {

// By name: a function under another's name does not compile, nor does a table that lacks one.
constexpr Isa make(const char* name, bool (*supported)()) {
    return {
        .name = name,
        .supported = *supported,
        .quad_bytes = Ops::kQuadBytes,
        .sums = Ops::kSums,

        .split = split<Ops>,
        .multiply = multiply,
        .combine = combine,

        .canonical = canonical,
        .low_bits = low_bits,
        .dot = dot,
        .project = project,
        .encode = encode,
        .decode = decode,

        .product32 = product<float>,
        .product16 = product<uint16_t>,
        .rms_norm = rms_norm,
        .rotate = rotate,
        .gated = gated,
        .attend = attend,
    };
}

}  // namespace
}  // namespace slip
