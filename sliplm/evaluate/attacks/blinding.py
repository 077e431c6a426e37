"""Undo the blinding: align matrices that read the same residual stream.

Threat model: q, k, v, gate and up of all layers read one stream, so their column Gram matrices W^T W share a basis,
which outlier coordinates mark. Blinding gives every group its own signed permutation and block Hadamard transform.
The thief compares two groups by their columns' statistics (length, kurtosis, largest entry, before and after undoing
the public Hadamard part) and assigns columns to columns by the Hungarian method. Source: statistics and assignment as
in Ainsworth et al., Git Re-Basin, arXiv 2209.04836. Oracles: none; the secret permutations score the result.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.split.blinding import Rotation, hadamard


def features(matrix: torch.Tensor) -> NDArray[np.float64]:
    """Statistics of the columns of `matrix` (N, K), standardised: (K, features)."""
    columns = matrix.double()
    size = columns.norm(dim=0).clamp_min(1e-30)
    unit = columns / size
    rows = [size.log(), (len(unit) * unit.pow(4).sum(0)).log(), unit.abs().amax(0).log(), unit.abs().sum(0).log()]
    table = torch.stack(rows, 1)
    return ((table - table.mean(0)) / table.std(0).clamp_min(1e-12)).numpy()


def unmix(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` (N, K) with its columns' public Hadamard transform undone: signed, permuted columns are left."""
    return hadamard(matrix.float())


def recovered(
    first: torch.Tensor, second: torch.Tensor, secrets: tuple[Rotation | None, Rotation | None]
) -> tuple[float, float]:
    """The share of columns of `first` matched to the same original coordinate of `second`, and what chance gives.

    `first` and `second`: the thief's matrices (N, K), (N', K); `secrets`: their input rotations, None for no
    blinding.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = (unmix(m) if r is not None else m for m, r in zip((first, second), secrets, strict=True))
    width = a.shape[1]
    cost = np.square(features(a)[:, None] - features(b)[None]).sum(-1)
    _, match = linear_sum_assignment(cost)
    here, there = (np.arange(width) if r is None else r.perm for r in secrets)
    return float((here == there[match]).mean()), 1 / width
