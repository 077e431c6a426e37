"""Fine-tune low-rank corrections: what the trusted side holds is one.

Threat model: the thief keeps the stolen matrices and trains W_edge + A B with A B of the protected rank, and whatever
small or missing tensors it was not given. Source: Hu et al., LoRA, arXiv 2106.09685; SLIP, arXiv 2407.10886. Oracles:
any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sliplm.attacks.stolen import Oracles, Stolen

RATES = RATES_IF_KNOWN = (2e-3, 5e-3)


class Correction(nn.Module):
    """x -> inner(x) + (x B^T) C^T A^T: B (k, K) and A (N, k), and between them, if given, a trainable core C (k, k)."""

    def __init__(self, inner: nn.Module, a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.core = None if core is None else nn.Parameter(core)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = x @ self.b.T
        return self.inner(x) + (low if self.core is None else low @ self.core.T) @ self.a.T


def prepare(model: Any, stolen: Stolen, oracles: Oracles) -> list[nn.Parameter]:
    """Add the corrections to `model`; what is trained are they and what the thief had to make up."""
    for group, plan in zip(stolen.groups(model), stolen.plan, strict=True):
        rank = plan.rank
        for m in group:
            a, b = torch.zeros(m.rows, rank), torch.randn(rank, m.columns) / m.columns**0.5
            model.set_submodule(m.name, Correction(model.get_submodule(m.name), a, b))
    return trainable(model, oracles, ("a", "b"))


def trainable(model: Any, oracles: Oracles, keys: tuple[str, ...]) -> list[nn.Parameter]:
    """Those corrections' parameters, and every tensor that the thief had to make up."""
    chosen: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, Correction):
            chosen += [p for key in keys if isinstance(p := getattr(module, key), nn.Parameter)]
        elif isinstance(module, nn.Embedding) or not any(True for _ in module.children()):
            held = [p for p in module.parameters(recurse=False) if p.dim() < 2 or isinstance(module, nn.Embedding)]
            chosen += [] if oracles.plain else held
    return list({id(p): p for p in chosen}.values())
