"""Fill the hole that removing singular components leaves (DESIGN §5.1).

W - U_k S_k V_k^T has an exact null space: the protected subspace itself, which survives quantisation. So the trusted side
takes U_k (S_k - M) V_k^T instead, with a secret random core M whose singular values are drawn from the residual's own
spectrum. The edge's part, residual + U_k M V_k^T, has full rank, and nothing in its spectrum marks the planted directions.
"""

from __future__ import annotations

import torch

from sliplm.split import secret
from sliplm.split.factors import Factors


def random_orthogonal(size: int) -> torch.Tensor:
    """A secret Haar-distributed orthogonal matrix, float64 (Mezzadri, Notices of the AMS 2007: QR, signs of diag R)."""
    q, r = torch.linalg.qr(secret.normal(size, size))
    return q * torch.sign(torch.diagonal(r))


def low_rank(factors: Factors, camouflage: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The trusted part A B of a matrix (N, K): A (N, k), B (k, K), float32.

    Without camouflage it is the paper's plain truncated SVD, whose residual gives the protected subspace away.
    """
    size = len(factors.s)
    core = torch.diag(factors.s.double())
    if camouflage:
        planted = torch.diag(secret.choice(factors.rest, size).double())
        core = core - random_orthogonal(size) @ planted @ random_orthogonal(size)
    return (factors.u.double() @ core).float(), factors.vt.clone()
