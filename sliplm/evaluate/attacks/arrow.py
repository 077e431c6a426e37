"""Match directions against a public base model.

Threat model: the thief has a public model whose weights are close to the protected ones (the owner fine-tuned it),
and identifies each stolen row with a public one. That undoes the output permutation, and with it most of the
blinding. Source: ArrowMatch in "Game of Arrows" (USENIX Security 2025), which matches the directions of obfuscated
weights; a signed permutation of the columns is met by comparing sorted magnitudes, which it does not change. Oracle:
the public base. Scales are guessed.
"""

from __future__ import annotations

import torch

from sliplm.split.blinding import Rotation, hadamard


def identified(stolen: torch.Tensor, base: torch.Tensor, outer: Rotation | None) -> float:
    """The share of rows of `stolen` (N, K) that are matched to the right row of `base` (N, K); chance is 1/N.

    `outer`: the secret rotation of the rows, which scores the matches; None means that there is no blinding.
    """
    a, b = stolen.float(), base.float()
    truth = torch.arange(len(b))
    if outer is not None:
        a = hadamard(hadamard(a).T).T  # the Hadamard part is public
        truth = torch.from_numpy(outer.perm).long()
        a, b = (m.abs().sort(1).values / m.square().mean().sqrt() for m in (a, b))
        match = torch.cdist(a, b).argmin(1)
    else:
        a, b = (m / m.norm(dim=1, keepdim=True).clamp_min(1e-30) for m in (a, b))
        match = (a @ b.T).argmax(1)
    return float((match == truth).float().mean())
