"""Train only inside the hole that the split left.

Threat model: of W = W_edge + A B, a plain split's W_edge has the protected subspaces as its smallest singular vectors
on the left and right, so only the k * k core between them is unknown. The thief takes the smallest singular vectors
of every stolen matrix and trains that core. Source: DESIGN §5 (found while this package was designed). Oracles: any;
in blinded coordinates the hole is as easy to see.
"""

from __future__ import annotations

import torch

from sliplm.evaluate.attacks.lora import Correction, trainable
from sliplm.evaluate.attacks.stolen import Oracles, Stolen
from sliplm.evaluate.attacks.training import Curve, Data, learn


def attack(stolen: Stolen, oracles: Oracles, data: Data) -> Curve:
    model = stolen.model(oracles)
    rank = stolen.settings["rank"]
    for group in stolen.groups(model):
        for m in group:
            weight = model.get_parameter(m.weight).detach()
            left, right = smallest(weight.T if m.transposed else weight, rank)
            model.set_submodule(m.name, Correction(model.get_submodule(m.name), left, right, torch.zeros(rank, rank)))
    return learn(model, lambda trained: trainable(trained, oracles, ("core",)), data, rates=(3e-2, 3e-1))


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
