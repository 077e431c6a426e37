"""The edge's fixed-point expansion of a weight: W ~ sum_j diag(s_j) Q_j with int8 Q_j."""

from __future__ import annotations

import torch


def quantise(weight: torch.Tensor, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand float32 `weight` (N, K) into int8 planes.

    Every row has its own scale; plane j expands what plane j-1 left over, so each plane adds about 8 bits.

    Returns:
        q: int8 (planes * N, K), row j*N + n is plane j of row n, entries in [-127, 127].
        scales: float32 (planes, N).
    """
    rest = weight.clone()
    rows = weight.shape[0]
    q = torch.empty(planes * rows, weight.shape[1], dtype=torch.int8)
    scales = torch.empty(planes, rows)
    for plane in range(planes):
        peak = torch.linalg.vector_norm(rest, ord=torch.inf, dim=1)
        scale = torch.where(peak > 0, peak / 127, 1.0)
        digits = (rest / scale[:, None]).round_().clamp_(-127, 127)
        q[plane * rows : (plane + 1) * rows] = digits.to(torch.int8)
        scales[plane] = scale
        rest -= digits.mul_(scale[:, None])
    return q, scales


def dequantise(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """sum_j diag(s_j) Q_j: float32 (N, K) from int8 (planes * N, K) and scales (planes, N)."""
    planes, rows = scales.shape
    return sum(q[j * rows : (j + 1) * rows].float() * scales[j][:, None] for j in range(planes))  # type: ignore[return-value]
