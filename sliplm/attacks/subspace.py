"""Find the protected subspace from the edge's matrix alone.

Threat model: the thief computes singular vectors of each matrix of the edge and looks for k of them that stand out.
Whoever finds the subspace has k * k unknowns per matrix left instead of k (N + K). The null space of the plain
split is described in docs/security.md. Oracles: without the blinding secrets, the subspace is looked for (and scored)
in the edge's own, rotated coordinates.
"""

from __future__ import annotations

import torch

DETECTORS = ("smallest", "largest", "middle", "twins", "heavy-tailed", "light-tailed", "outliers", "holes", "localised")


def find(matrix: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """Each detector's guess at the right protected subspace of `matrix` (N, K): orthonormal columns (K, count)."""
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:  # the right singular vectors of a tall matrix come from its small Gram matrix
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        s, v = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    else:
        _, s, vt = torch.linalg.svd(wide, full_matrices=False)
        v = vt.T
    energy = v.square()
    shape = len(v) * energy.square().sum(0)
    gap = (s[:-1] - s[1:]) / s[:-1].clamp_min(1e-30)
    near = torch.minimum(torch.cat([gap, gap[-1:]]), torch.cat([gap[:1], gap]))
    size = wide.norm(dim=0).clamp_min(1e-30).log()
    few = max(4, len(v) // 64)
    scores = {
        "smallest": -s,
        "largest": s,
        "middle": -(s.square() / s.square().max().clamp_min(1e-30) - 1 / 3).abs(),  # where shared places lie densest
        "twins": -near,  # two singular values closer than their mutual repulsion allows
        "heavy-tailed": shape,
        "light-tailed": -shape,
        "outliers": energy[size.topk(few).indices].sum(0),  # aligned with columns of unusual length
        "holes": energy[(-size).topk(few).indices].sum(0),
        "localised": energy[energy.square().sum(1).topk(few).indices].sum(0),  # coordinates held by few directions
    }
    return {name: v[:, scores[name].topk(count).indices] for name in DETECTORS}


def overlap(guess: torch.Tensor, secret: torch.Tensor) -> float:
    """The share of `secret` (n, k) that lies in `guess` (n, k), both orthonormal: 1 is found, k / n is chance."""
    return float((guess.T.double() @ secret.double()).square().sum()) / secret.shape[1]
