"""Fill the hole that removing singular components leaves, and move it elsewhere (DESIGN §5.1).

W - U_k S_k V_k^T has an exact null space: the protected subspace itself, which survives quantisation. Two steps:

1. *Fill.* W' = W - U_k (S_k - M) V_k^T, with a secret random core M whose singular values lie between those of the
   residual. W' has full rank and nothing unusual in its spectrum. But its planted singular vectors still span U_k and
   V_k, and show by their shape: leading singular vectors are heavy-tailed.
2. *Swap.* The edge gets S_L W' S_R, where S_R exchanges V_k with as many random directions of the bulk, and S_L does
   the same for U_k. Singular values stay; the planted singular vectors become random directions; and V_k, where random
   directions used to be, is spread over all singular vectors as a random subspace is.

Swapping costs the trusted side rank 3k in place of k. `docs/security.md` has what detectors find with and without it.
"""

from __future__ import annotations

import torch

from sliplm.split import secret
from sliplm.split.factors import Factors


def trusted_rank(rank: int, rows: int, columns: int, camouflage: bool) -> int:
    """The rank of the trusted part of a (rows, columns) matrix of which `rank` singular components are protected."""
    rank = min(rank, rows, columns)
    return rank + 2 * _swapped(rank, rows, columns) if camouflage else rank


def low_rank(weight: torch.Tensor, factors: Factors, camouflage: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The trusted part A B of `weight` (N, K) with its leading `factors`: A (N, r), B (r, K), float32.

    r is `trusted_rank`. Without camouflage it is the paper's plain truncated SVD, whose residual gives the subspace
    away.
    """
    if not camouflage:
        return factors.u * factors.s, factors.vt.clone()
    size = len(factors.s)
    planted = random_orthogonal(size) * between(factors.rest, size) @ random_orthogonal(size)
    core = (torch.diag(factors.s.double()) - planted).float()
    a, b = factors.u @ core, factors.vt
    count = _swapped(size, *weight.shape)
    left, right = _exchange(factors.u, count), _exchange(factors.vt.T, count)
    # W' = W - A B. Then S_L W' S_R = W - A B - (W' right) right^T - left (left^T W' S_R).
    moved = weight @ right - a @ (b @ right)
    back = left.T @ weight - (left.T @ a) @ b
    back -= (left.T @ moved) @ right.T
    return torch.cat([a, moved, left], 1), torch.cat([b, right.T, back])


def between(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` secret float64 numbers spread like the 1-D tensor `values`, none equal to one of them.

    Singular values repel each other, so drawing them with repetition would mark the planted ones as twins.
    """
    ordered = values.double().sort().values
    if len(ordered) < 2:
        return ordered[torch.zeros(count, dtype=torch.long)]
    # A random order of the gaps between neighbours; only a matrix with few of them uses one twice.
    gap = secret.normal(len(ordered) - 1).argsort().repeat(-(-count // (len(ordered) - 1)))[:count]
    place = 0.25 + 0.5 * torch.special.ndtr(secret.normal(count))
    planted: torch.Tensor = ordered[gap] + place * (ordered[gap + 1] - ordered[gap])
    return planted


def random_orthogonal(size: int) -> torch.Tensor:
    """A secret Haar-distributed orthogonal matrix, float64 (Mezzadri, Notices of the AMS 2007: QR, signs of diag R)."""
    q, r = torch.linalg.qr(secret.normal(size, size))
    turned: torch.Tensor = q * torch.sign(torch.diagonal(r))
    return turned


def _swapped(rank: int, rows: int, columns: int) -> int:
    """How many of `rank` directions are swapped: all, if the matrix has as many others."""
    return min(rank, min(rows, columns) - rank)


def _exchange(basis: torch.Tensor, count: int) -> torch.Tensor:
    """D (n, count) such that the reflection I - D D^T exchanges the first `count` columns of the orthonormal `basis`
    (n, k) with secret random orthonormal directions outside its span."""
    basis = basis.double()
    other = secret.normal(len(basis), count)
    for _ in range(2):  # Gram-Schmidt, twice for full precision
        other = torch.linalg.qr(other - basis @ (basis.T @ other))[0]
    return (basis[:, :count] - other).float()
