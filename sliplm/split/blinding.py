"""A secret change of basis for one side of a group: a signed permutation, then a block Hadamard transform, twice.

The edge's matrix is stored in blinded coordinates, so that matrices of neighbouring layers share no basis,
and outliers spread before quantisation; moving a vector costs the trusted side O(n log n). (DESIGN, 5.) One round is
not enough: the Hadamard transform is public, so a thief undoes it and is left with a signed permutation, which can be
found by who knows a similar matrix (`evaluate.attacks.gram`).
"""

import secrets
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

MAX_BLOCK = 512
ROUNDS = 2

Array = TypeVar("Array", torch.Tensor, NDArray[np.floating])


@dataclass(frozen=True, repr=False, eq=False)
class Rotation:
    """x -> H(sign * x[perm]) in each round, with H orthonormal and block diagonal. Its repr shows the size only."""

    perm: NDArray[np.int32]
    """(ROUNDS, n): permutations of 0..n-1."""
    sign: NDArray[np.float32]
    """(ROUNDS, n): +1 or -1."""

    @classmethod
    def random(cls, n: int, rng: np.random.Generator | None = None) -> "Rotation":
        """A random rotation of n values, from the system's entropy unless a test passes `rng`."""
        draw = secrets.token_bytes if rng is None else rng.bytes
        keys = np.frombuffer(draw(8 * ROUNDS * n), np.uint64).reshape(ROUNDS, n)
        bits = np.unpackbits(np.frombuffer(draw((ROUNDS * n + 7) // 8), np.uint8))[: ROUNDS * n].reshape(ROUNDS, n)
        return cls(np.argsort(keys, axis=1, kind="stable").astype(np.int32), bits.astype(np.float32) * 2 - 1)

    def __len__(self) -> int:
        return int(self.perm.shape[1])

    def __repr__(self) -> str:
        return f"Rotation(n={len(self)})"

    def apply(self, x: Array) -> Array:
        """The rotated `x` (..., n), along its last axis, in its floating type."""
        for perm, sign in zip(self.perm, self.sign, strict=True):
            if isinstance(x, torch.Tensor):
                x = hadamard(x[..., torch.from_numpy(perm).to(x.device)] * torch.from_numpy(sign).to(x.device, x.dtype))
            else:
                x = hadamard(x[..., perm] * sign.astype(x.dtype))
        return x

    def invert(self, y: Array) -> Array:
        """The x (..., n) with apply(x) = y."""
        for perm, sign in zip(self.perm[::-1], self.sign[::-1], strict=True):
            if isinstance(y, torch.Tensor):
                x = torch.empty_like(y)
                x[..., torch.from_numpy(perm).to(y.device)] = hadamard(y) * torch.from_numpy(sign).to(y.device, y.dtype)
            else:
                x = np.empty_like(y)
                x[..., perm] = hadamard(y) * sign.astype(y.dtype)
            y = x
        return y


def block_sizes(n: int) -> list[int]:
    """Powers of two, at most 512, largest first, that sum to n: 577 = 512 + 64 + 1."""
    tail = n % MAX_BLOCK
    return [MAX_BLOCK] * (n // MAX_BLOCK) + [1 << bit for bit in range(8, -1, -1) if tail >> bit & 1]


def hadamard(x: Array) -> Array:
    """The orthonormal block Walsh-Hadamard transform of the last axis of `x` (..., n). It is its own inverse.

    A block of a*b values becomes H_a X H_b on its (a, b) reshape, since H_ab is their Kronecker product.
    """
    n = x.shape[-1]
    whole = n - n % MAX_BLOCK
    out = torch.empty_like(x) if isinstance(x, torch.Tensor) else np.empty_like(x)
    start = 0
    for size in ([MAX_BLOCK] if whole else []) + block_sizes(n - whole):
        stop = start + (whole if size == MAX_BLOCK else size)
        a = 1 << (size.bit_length() // 2)
        b = size // a
        blocks = x[..., start:stop].reshape(-1, a, b)
        out[..., start:stop] = (_matrix(a, x) @ (blocks @ _matrix(b, x))).reshape(out[..., start:stop].shape)
        start = stop
    return out


def _matrix(size: int, like: Array) -> Array:
    h = _hadamard_matrix(size)
    if isinstance(like, torch.Tensor):
        return torch.from_numpy(h).to(like.device, like.dtype)
    return h.astype(like.dtype)


@cache
def _hadamard_matrix(size: int) -> NDArray[np.float64]:
    h: NDArray[np.float64] = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    h /= np.sqrt(size)
    return h
