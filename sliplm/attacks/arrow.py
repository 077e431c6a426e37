"""Match directions against a public base model.

Threat model: the thief has a public model whose weights are close to the protected ones (the owner fine-tuned it),
and identifies each stolen row with a public one. That undoes the output permutation, and with it most of the
blinding. Source: ArrowMatch in "Game of Arrows" (USENIX Security 2025), which matches the directions of obfuscated
weights; a signed permutation of the columns is met by comparing sorted magnitudes, which it does not change. Oracle:
the public base. Scales are guessed.
"""

from __future__ import annotations

import torch

from sliplm.attacks.gram import frame
from sliplm.split.blinding import Blinding, hadamard


def identified(stolen: torch.Tensor, base: torch.Tensor, outer: Blinding | None) -> float:
    """How well rows of `stolen` (N, K) are matched to rows of `base` (N, K): the mean squared cosine between what a
    stolen row is, in the original's coordinates, and what it is taken for; chance is 1/N.

    `outer`: the secret blinding of the rows, which scores the matches; None means that there is no blinding.
    """
    a, b = stolen.float(), base.float()
    if outer is not None:
        a = hadamard(hadamard(a).T).T  # the last round's Hadamard transform is public
        a, b = (m.abs().sort(1).values / m.square().mean().sqrt() for m in (a, b))
        match = torch.cdist(a, b).argmin(1)
    else:
        a, b = (m / m.norm(dim=1, keepdim=True).clamp_min(1e-30) for m in (a, b))
        match = (a @ b.T).argmax(1)
    return float(frame(outer and outer.dual(), len(b))[torch.arange(len(b)), match].square().mean())
