"""Undo the blinding: align matrices that read the same residual stream.

Threat model: q, k, v, gate and up of all layers read one stream, so their column Gram matrices W^T W share a basis,
which outlier coordinates mark. Blinding gives every group a basis of its own. The thief undoes the last round's public
Hadamard transform, compares two groups by their columns' statistics (length, kurtosis, largest entry), and assigns
columns to columns by the Hungarian method. Source: statistics and assignment as in Ainsworth et al., Git Re-Basin,
arXiv 2209.04836. Oracles: none; the secret blindings score the result.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.attacks.gram import frame
from sliplm.split.blinding import Blinding, hadamard


def features(matrix: torch.Tensor) -> NDArray[np.float64]:
    """Statistics of the columns of `matrix` (N, K), standardised: (K, features)."""
    columns = matrix.double()
    size = columns.norm(dim=0).clamp_min(1e-30)
    unit = columns / size
    rows = [size.log(), (len(unit) * unit.pow(4).sum(0)).log(), unit.abs().amax(0).log(), unit.abs().sum(0).log()]
    table = torch.stack(rows, 1)
    return ((table - table.mean(0)) / table.std(0).clamp_min(1e-12)).numpy()


def recovered(
    first: torch.Tensor, second: torch.Tensor, secrets: tuple[Blinding | None, Blinding | None]
) -> tuple[float, float]:
    """How well columns of `first` (N, K) are matched to columns of `second` (N', K) that mean the same, and what chance
    gives: the mean squared cosine between what the two are in the original's coordinates.

    `secrets`: the input blindings of both, None for no blinding; they score the result.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = (hadamard(m.float()) if r is not None else m for m, r in zip((first, second), secrets, strict=True))
    width = a.shape[1]
    cost = np.square(features(a)[:, None] - features(b)[None]).sum(-1)
    _, match = linear_sum_assignment(cost)
    here, there = (frame(r, width) for r in secrets)
    return float((here * there[match]).sum(1).square().mean()), 1 / width
