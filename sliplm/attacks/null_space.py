"""Train only inside the hole that the split left.

Threat model: of W = W_edge + A B, a plain split's W_edge has the protected subspaces as its smallest singular vectors
on the left and right, so only the k * k core between them is unknown. The thief takes the smallest singular vectors
of every stolen matrix and trains that core. Source: docs/security.md. Oracles: any; in blinded coordinates
the hole is as easy to see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sliplm.attacks.lora import Correction, trainable
from sliplm.attacks.stolen import Oracles, Stolen

RATES = RATES_IF_KNOWN = (3e-2, 3e-1)


def prepare(model: Any, stolen: Stolen, oracles: Oracles) -> list[nn.Parameter]:
    """Add the cores to `model`; what is trained are they and what the thief had to make up."""
    for group, plan in zip(stolen.groups(model), stolen.plan, strict=True):
        rank = plan.rank
        for m in group:
            weight = model.get_parameter(m.weight).detach()
            left, right = smallest(weight.T if m.transposed else weight, rank)
            model.set_submodule(m.name, Correction(model.get_submodule(m.name), left, right, torch.zeros(rank, rank)))
    return trainable(model, oracles, ("core",))


def smallest(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left (N, rank) and right (rank, K) singular vectors of the `rank` smallest singular values of `weight` (N, K)."""
    if weight.shape[0] < weight.shape[1]:
        right, left = smallest(weight.T, rank)
        return left.T.contiguous(), right.T.contiguous()
    wide = weight.double()
    v = torch.linalg.eigh(wide.T @ wide)[1][:, :rank]
    # N >= K: the left subspace is the one where W v points, if anywhere; rounding noise decides in a plain split.
    u = torch.linalg.qr(wide @ v)[0]
    return u.float(), v.T.float()
