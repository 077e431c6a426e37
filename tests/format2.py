"""The blinding of bundle format 2, which fell: `rounds` of a signed permutation and a block Hadamard transform.

Kept for the attacks to show what they can do (`evaluate.attacks.unblinding`, `bench/unblinding.py`), and for nothing else.
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
