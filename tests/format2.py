"""The blinding of bundle format 2, which fell: `rounds` of a signed permutation and a block Hadamard transform. And
matrices like those that it fell with.

Kept for the attacks to show what they can do (`attacks.unblinding`), and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.split.blinding import hadamard


@dataclass(frozen=True)
class Rotation:
    """x -> H(sign * x[perm]) in each round; `perm` and `sign` (rounds, n)."""

    perm: NDArray[np.int64]
    sign: torch.Tensor

    @classmethod
    def random(cls, n: int, rng: np.random.Generator, rounds: int = 2) -> Rotation:
        perm = np.stack([rng.permutation(n) for _ in range(rounds)])
        return cls(perm, torch.from_numpy(2.0 * rng.integers(0, 2, (rounds, n)) - 1))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        for perm, sign in zip(self.perm, self.sign, strict=True):
            x = hadamard(x[..., perm] * sign.to(x.dtype))
        return x

    def invert(self, y: torch.Tensor) -> torch.Tensor:
        for perm, sign in zip(self.perm[::-1], self.sign.flip(0), strict=True):
            x = torch.empty_like(y)
            x[..., perm] = hadamard(y) * sign.to(y.dtype)
            y = x
        return y

    def dual(self) -> Rotation:
        return self


def trained_like(n: int, rng: np.random.Generator, localised: int = 4) -> torch.Tensor:
    """A matrix (n, n), float32. As in trained ones, the `localised` smallest singular vectors of inputs are almost one
    coordinate each, with 99 % of their energy; the others are random directions."""
    right = rng.standard_normal((n, n), np.float32)
    right[:, :localised] *= 0.1
    right[range(localised), range(localised)] += n**0.5
    left, right = (np.linalg.qr(m)[0][:, ::-1] for m in (rng.standard_normal((n, n), np.float32), right))
    return torch.from_numpy(left * np.linspace(2, 0.2, n, dtype=np.float32) @ right.T)
