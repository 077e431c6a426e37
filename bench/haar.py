"""How far blindings are from rotations drawn from all orthogonal matrices alike (Haar): for those, what the edge holds
depends on a matrix through its singular values only.

    python bench/haar.py [SIZE ...]        # 576 1536 2048 4096 5632

The diagonal is left out, and the last, public Hadamard transform undone. z: deviations of the kurtosis and of the sixth
moment of the entries (some ten million of each) from Haar's, in standard errors. Rows: the largest eigenvalue of the
correlations of squared rows; a value well above that of Haar's means that rows depend on each other.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch

from sliplm.split.blinding import Blinding, hadamard

ENTRIES = 1e7


def entries(n: int) -> torch.Tensor:
    """One blinding's rotation (n, n), scaled to entries of variance 1."""
    whole = Blinding.random(n)
    whole = replace(whole, diagonal=np.ones_like(whole.diagonal))
    return hadamard(whole.apply(torch.eye(n))) * n**0.5


def haar(n: int) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n))
    return q * torch.sign(torch.diagonal(r)) * n**0.5


def rows(x: torch.Tensor) -> float:
    """Top eigenvalue of the correlations of squared entries between output positions."""
    return float(torch.linalg.eigvalsh(torch.corrcoef(x.square().T))[-1])


def main() -> None:
    print(f"{'size':>6}{'kurtosis, z':>14}{'sixth, z':>10}{'rows':>8}{'rows, Haar':>12}")
    for n in map(int, sys.argv[1:] or (576, 1536, 2048, 4096, 5632)):
        count = max(1, round(ENTRIES / n**2))
        fourth = sixth = 0.0
        for _ in range(count):
            squares = (x := entries(n)).square().double()
            fourth += float(squares.square().mean()) / count
            sixth += float((squares**3).mean()) / count
        total = count * n * n
        z4 = (fourth - 3 * n / (n + 2)) / (96 / total) ** 0.5
        z6 = (sixth - 15 * n * n / ((n + 2) * (n + 4))) / (10170 / total) ** 0.5
        print(f"{n:6}{z4:14.2f}{z6:10.2f}{rows(x):8.3f}{rows(haar(n)):12.3f}", flush=True)


if __name__ == "__main__":
    main()
