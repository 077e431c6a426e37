"""Recover the secret basis with a public model that is close to the protected one.

Threat model: the thief has a public base. X^T X of a stolen matrix does not depend on the basis of its outputs, so it
is the base's W^T W in another basis of the inputs, up to the fine-tune. Two ways to find that basis:

- *Columns*: undo the public Hadamard transform of the last round. If a signed permutation is all that is left, the
  magnitudes of the two Gram matrices agree up to it, which iterated assignment finds.
- *Spectrum*: whatever the basis is, eigenvectors go to eigenvectors, and eigenvalues tell which to which, as far as
  they keep their order.

Source: a review of this package, for the first (iterated assignment as in Vogelstein et al., PLOS ONE 2015); Umeyama,
PAMI 1988, for the second. Oracle: the public base; the secret blinding scores the result.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from sliplm.split.blinding import Blinding, hadamard

_ROUNDS = 12
_STRONGEST = 60  # correlations of a column that mark it


def frame(blinding: Blinding | None, width: int) -> torch.Tensor:
    """Row i (width): the original's unit direction that coordinate i is, once the last public transform is undone.

    `blinding`: of a matrix's inputs; of its outputs, the dual."""
    whole = torch.eye(width)
    return whole if blinding is None else functional.normalize(blinding.invert(hadamard(whole)), dim=1)


def columns(stolen: torch.Tensor, base: torch.Tensor, secret: Blinding | None) -> float:
    """How much of the basis of the inputs of `stolen` (N, K) is found with `base` (N, K): mean squared cosine between
    the original coordinate that each column is taken for and what it is; chance is 1/K."""
    from scipy.optimize import linear_sum_assignment

    a, b = (_magnitudes(m) for m in (stolen if secret is None else hadamard(stolen), base))
    match = linear_sum_assignment(torch.cdist(_marks(a), _marks(b)).numpy())[1]
    x, y = (m.fill_diagonal_(0) - m.mean() for m in (a, b))
    for _ in range(_ROUNDS):
        better = linear_sum_assignment(-(x @ y[match]).numpy())[1]
        if (better == match).all():
            break
        match = better
    return float(frame(secret, len(a))[range(len(a)), match].square().mean())


def spectrum(stolen: torch.Tensor, base: torch.Tensor, secret: Blinding | None) -> float:
    """As `columns`, for right singular vectors matched in the order of their values."""
    a, b = (torch.linalg.eigh(m.T.double() @ m.double())[1] for m in (stolen, base))
    truth = b.T if secret is None else functional.normalize(secret.dual().apply(b.T.contiguous()), dim=1)
    return float((a.T * truth).sum(1).square().mean())


def without_leading(base: torch.Tensor, rank: int, filled: bool = True) -> torch.Tensor:
    """`base` (N, K) with its `rank` leading singular values brought down to the median, as a split does, or to 0."""
    u, s, vt = torch.linalg.svd(base, full_matrices=False)
    s[:rank] = (s[rank:].median() if len(s) > rank else s[:rank]) if filled else 0
    return (u * s) @ vt


def _magnitudes(matrix: torch.Tensor) -> torch.Tensor:
    """|correlation| of the columns, with their squared lengths relative to the median on the diagonal: (K, K)."""
    gram = matrix.T @ matrix
    size = gram.diagonal().clamp_min(1e-30)
    found = (gram / size.sqrt()[:, None] / size.sqrt()).abs()
    found.diagonal().copy_(size / size.median())
    return found


def _marks(magnitudes: torch.Tensor) -> torch.Tensor:
    """What is known of a column whatever the order of the others: its length, its strongest correlations."""
    others = magnitudes.clone().fill_diagonal_(0).sort(1, descending=True).values[:, :_STRONGEST]
    return torch.cat([4 * magnitudes.diagonal().log()[:, None], (others + 0.02).log()], 1)
