"""A secret change of basis for one side of a group: four rounds of permutation, plane rotations and block Hadamard
transform, with a secret diagonal after the first.

The edge's matrix is stored in blinded coordinates, so that matrices of neighbouring layers share no basis, and outliers
spread before quantisation; moving a vector costs the trusted side O(n log n). Why so many rounds, why angles and not
signs, and why a diagonal: with two rounds of signs a thief who has a similar matrix reads the signs off
(`attacks.unblinding`); four rounds of secret angles look like rotations drawn from all orthogonal matrices
(`bench/haar.py`), and the diagonal blurs the singular vectors by which a thief would line up what he reads with what he
knows. It stands after the first round because there its basis is hidden: before the last one it can be stripped off.

One rule goes with it: matrices that share an input are stacked under *one* blinding of outputs. Read apart, each with
outputs blinded on its own, their cross-Gram matrices would give the shared basis away, whatever family it is from.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.errors import BundleError

MAX_BLOCK = 512
ROUNDS = 4
SPREAD = 1.25  # the diagonal's entries are log-uniform between 1/SPREAD and SPREAD

Array = TypeVar("Array", torch.Tensor, NDArray[np.floating])


@dataclass(frozen=True, repr=False, eq=False)
class Blinding:
    """x -> H G x[perm] in each round, and times `diagonal` after the first; its repr shows the size only.

    G turns the planes of coordinates (i, i + n/2), H is the orthonormal block Hadamard transform. With ones for
    `diagonal` it is an orthogonal map.
    """

    perm: NDArray[np.int32]
    """(ROUNDS, n): permutations of 0..n-1."""
    angle: NDArray[np.float32]
    """(ROUNDS, n // 2): of the planes, in radians."""
    diagonal: NDArray[np.float32]
    """(n,): positive."""

    @classmethod
    def random(cls, n: int, rng: np.random.Generator | None = None) -> "Blinding":
        """For n values, from the system's entropy unless a test passes `rng`."""
        draw = secrets.token_bytes if rng is None else rng.bytes

        def uniform(*shape: int) -> NDArray[np.float64]:
            return np.frombuffer(draw(4 * int(np.prod(shape))), np.uint32).reshape(shape) / 2.0**32

        keys = np.frombuffer(draw(8 * ROUNDS * n), np.uint64).reshape(ROUNDS, n)
        perm = np.argsort(keys, axis=1, kind="stable").astype(np.int32)
        angle = (2 * np.pi * uniform(ROUNDS, n // 2)).astype(np.float32)
        return cls(perm, angle, (SPREAD ** (2 * uniform(n) - 1)).astype(np.float32))

    @staticmethod
    def layout(n: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a bundle stores of one for `n` values: name -> dtype, shape."""
        return {
            "perm": (torch.int32, (ROUNDS, n)),
            "angle": (torch.float32, (ROUNDS, n // 2)),
            "diagonal": (torch.float32, (n,)),
        }

    @classmethod
    def read(cls, tensor: Callable[[str], torch.Tensor]) -> "Blinding":
        """From tensors by the names of `layout`. Raises BundleError if they make no blinding: the native core reads and
        writes where the permutations say."""
        found = cls(*(tensor(name).numpy() for name in cls.layout(0)))
        if not (np.sort(found.perm, axis=1) == np.arange(len(found))).all():
            raise BundleError("a blinding's permutations are damaged.")
        if not (np.isfinite(found.angle).all() and np.isfinite(found.diagonal).all() and (found.diagonal > 0).all()):
            raise BundleError("a blinding's angles or its diagonal are damaged.")
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of `layout`."""
        return {name: torch.from_numpy(getattr(self, name)) for name in self.layout(0)}

    def __len__(self) -> int:
        return int(self.perm.shape[1])

    def __repr__(self) -> str:
        return f"Blinding(n={len(self)})"

    @cached_property
    def turns(self) -> NDArray[np.float32]:
        """(ROUNDS, 2, n // 2): cosines and sines of the angles. Rounded, so that a plane keeps lengths to 2^-24."""
        return np.stack([np.cos(self.angle, dtype=np.float64), np.sin(self.angle, dtype=np.float64)], 1).astype(
            np.float32
        )

    def dual(self) -> "Blinding":
        """The map S with <S x, self y> = <x, y> for all x and y: what a matrix's rows go through where its inputs go
        through this."""
        return replace(self, diagonal=np.float32(1) / self.diagonal)

    def apply(self, x: Array) -> Array:
        """The blinded `x` (..., n), along its last axis, in its floating type."""
        for number, (perm, turns) in enumerate(zip(self.perm, self.turns, strict=True)):
            if number == 1:
                x = x * _like(self.diagonal, x)
            x = hadamard(_turn(x[..., _index(perm, x)], turns))
        return x

    def invert(self, y: Array) -> Array:
        """The x (..., n) with apply(x) = y."""
        for number in range(len(self.perm) - 1, -1, -1):
            x = torch.empty_like(y) if isinstance(y, torch.Tensor) else np.empty_like(y)
            x[..., _index(self.perm[number], y)] = _turn(hadamard(y), self.turns[number] * _BACK)
            y = x / _like(self.diagonal, x) if number == 1 else x
        return y


_BACK = np.array([[1], [-1]], np.float32)


SIDES = ("in", "out")  # of inputs, of outputs: what the names of a bundle's tensors begin with


def stored(tensor: Callable[[str], torch.Tensor], leader: str = "") -> tuple[Blinding, Blinding]:
    """The blindings of inputs and of outputs of a group, from its tensors; from a whole bundle's, if it says who leads
    the group."""
    prefix = f"{leader}." if leader else ""
    inner, outer = (Blinding.read(lambda kind, side=side: tensor(f"{prefix}{side}_{kind}")) for side in SIDES)  # type: ignore[misc]
    return inner, outer


def blind(matrix: Array, inner: Blinding, outer: Blinding) -> Array:
    """The `matrix` (N, K) in secret bases of inputs (K) and outputs (N): blind(W) inner(x) = outer(W x)."""
    return outer.apply(inner.dual().apply(matrix).T).T


def unblind(matrix: Array, inner: Blinding, outer: Blinding) -> Array:
    """The inverse of `blind`."""
    return outer.invert(inner.dual().invert(matrix).T).T


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
        left, right = (_like(_hadamard_matrix(side), x) for side in (a, b))
        out[..., start:stop] = (left @ (blocks @ right)).reshape(out[..., start:stop].shape)
        start = stop
    return out


def _turn(x: Array, turns: NDArray[np.float32]) -> Array:
    """Turn the planes (i, i + n/2) of the last axis; of an odd n, the last value stays."""
    half = turns.shape[-1]
    cos, sin = (_like(t, x) for t in turns)
    out = x.clone() if isinstance(x, torch.Tensor) else x.copy()
    out[..., :half] = cos * x[..., :half] - sin * x[..., half : 2 * half]
    out[..., half : 2 * half] = sin * x[..., :half] + cos * x[..., half : 2 * half]
    return out


def _index(perm: NDArray[np.int32], like: Array) -> Any:
    return torch.from_numpy(perm).to(like.device) if isinstance(like, torch.Tensor) else perm


def _like(values: NDArray[np.floating], like: Array) -> Array:
    if isinstance(like, torch.Tensor):
        return torch.from_numpy(values).to(like.device, like.dtype)
    return values.astype(like.dtype)


@cache
def _hadamard_matrix(size: int) -> NDArray[np.float64]:
    h: NDArray[np.float64] = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    h /= np.sqrt(size)
    return h
