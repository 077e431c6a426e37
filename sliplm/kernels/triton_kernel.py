"""Exact products on the tensor cores, in Triton: digits, int8 dot products and the reduction modulo p in one kernel.

Balanced digits. Let z be x modulo p in [-(p-1)/2, (p-1)/2]; then z = b_0 + 256 b_1 + 256^2 b_2 + 256^3 b_3 with every
b_j in [-128, 127], and the b_j are the bytes of (z + 0x80808080) ^ 0x80808080: int8 operands as tensor cores want them,
with nothing to correct afterwards (`tl.dot` takes no uint8). A column of the digit tile is one digit of one token; each
weight is read once and multiplied by all of them.

No overflow. |sum of one digit's products| <= 128 * 128 * 65535 < 2^30 fits the int32 accumulator, in any order of
summation; |Q z| < 2^7 * 2^30 * 2^16 = 2^53 fits the int64 in which the four are put together.

Small and large. Up to `SMALL` tokens a product is bound by reading Q: the kernel takes the digits from x itself, and
its tiles are low, so that many programs read at once. Beyond that, every tile of rows would take the same digits again,
which costs as much as its products, so a kernel of its own does it first.
"""

import torch
import triton
import triton.language as tl

TILE = 128  # rows and columns of Q are multiples of this, so only tokens need masks
SMALL = 4


def product(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Q x_t mod p for q (M, K) int8, M and K multiples of `TILE`, and x (T, K) int32, the bits of any uint32.

    The result (T, M), int32, is canonical. On the current CUDA stream.
    """
    (tokens, cols), rows = x.shape, len(q)
    y = torch.empty((tokens, rows), dtype=torch.int32, device=x.device)
    if split := tokens > SMALL:
        digits = torch.empty((4, tokens, cols), dtype=torch.int8, device=x.device)
        _split[(tokens, cols // TILE)](x, digits, tokens, cols, TILE)
    tile_m, tile_t, warps, stages = tiling(tokens)
    grid = (triton.cdiv(tokens, tile_t), rows // tile_m)  # tokens first: programs that share rows of Q run together
    source = digits if split else x
    _product[grid](q, source, y, tokens, rows, cols, tile_m, tile_t, TILE, split, num_warps=warps, num_stages=stages)
    return y


def tiling(tokens: int) -> tuple[int, int, int, int]:
    """Rows and tokens of a tile, warps, and loads in flight, for a product with `tokens` tokens."""
    if tokens <= SMALL:
        return 32, SMALL, 4, 4
    return (64, 16, 4, 4) if tokens <= 16 else (128, 32, 8, 3)


@triton.jit
def _digits(x):
    """The four balanced digits of x (int32, the bits of a uint32) modulo p, as the bytes of an int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x & 0x7FFFFFFF) + (x >> 31)  # 2^31 = 1 mod p
    z = tl.where(x > 0x3FFFFFFF, x - 0x7FFFFFFF, x)
    return ((z + 0x80808080) ^ 0x80808080).to(tl.int32, bitcast=True)


@triton.jit
def _reduce(v):
    """v (int64, |v| < 2^53) modulo p, canonical, as int32."""
    v += 0x7FFFFFFF << 23  # now 0 <= v < 2^55
    v = (v & 0x7FFFFFFF) + (v >> 31)  # now v < 2p
    return tl.where(v >= 0x7FFFFFFF, v - 0x7FFFFFFF, v).to(tl.int32)


@triton.jit(do_not_specialize=["tokens"])
def _split(x_ptr, out_ptr, tokens, cols, TILE_K: tl.constexpr):
    """The digits of x (tokens, cols) int32, as int8 (4, tokens, cols)."""
    at = tl.program_id(0).to(tl.int64) * cols + tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    digits = _digits(tl.load(x_ptr + at))
    for j in tl.static_range(4):
        tl.store(out_ptr + j * tokens.to(tl.int64) * cols + at, (digits >> (8 * j)).to(tl.int8))


@triton.jit(do_not_specialize=["tokens"])
def _product(
    q_ptr,
    x_ptr,
    y_ptr,
    tokens,
    rows,
    cols,
    TILE_M: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile (TILE_T, TILE_M) of y. x holds uint32 (tokens, cols), or with SPLIT int8 digits (4, tokens, cols)."""
    m = tl.program_id(1).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    t = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    j = tl.arange(0, 4)
    k = tl.arange(0, TILE_K)
    there = t < tokens
    q_ptrs = q_ptr + m[:, None] * cols + k[None, :]
    if SPLIT:
        digit_rows = tl.reshape(j[:, None] * tokens.to(tl.int64) + t[None, :], [4 * TILE_T])
        mask = tl.reshape(tl.broadcast_to(there[None, :], [4, TILE_T]), [4 * TILE_T])
        x_ptrs = x_ptr + digit_rows[:, None] * cols + k[None, :]
    else:
        mask = there
        x_ptrs = x_ptr + t[:, None] * cols + k[None, :]
    total = tl.zeros([TILE_M, 4 * TILE_T], tl.int32)
    for start in range(0, cols, TILE_K):
        q = tl.load(q_ptrs + start)
        d = tl.load(x_ptrs + start, mask=mask[:, None], other=0)
        if not SPLIT:
            shifted = _digits(d)[None, :, :] >> (8 * j)[:, None, None]
            d = tl.reshape(shifted.to(tl.int8), [4 * TILE_T, TILE_K])
        total = tl.dot(q, tl.trans(d), total, out_dtype=tl.int32)
    by_digit = tl.reshape(total, [TILE_M, 4, TILE_T]).to(tl.int64) << (8 * j)[None, :, None]
    y = _reduce(tl.sum(by_digit, axis=1))
    tl.store(y_ptr + t[None, :] * rows + m[:, None], y, mask=there[None, :])
