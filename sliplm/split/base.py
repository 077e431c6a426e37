"""Split a fine-tune of a public model: only the difference is secret, so only the difference goes to the trusted side.

Where the difference D = W - W_public has low rank (LoRA), the trusted side takes all of it, and the edge holds the
public weights, just as without the fine-tune: it learns nothing about D but that it is there. Otherwise the trusted
side takes the leading components of D, camouflaged as usual, and the edge holds W_public plus the rest of D. What
that rest is worth is not measured here; `docs/security.md` says what this gives and what not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from sliplm.errors import UnsupportedModelError
from sliplm.split.camouflage import low_rank, rounded, trusted_rank
from sliplm.split.factors import leading
from sliplm.split.source import Source, fake_mode, open_source

logger = logging.getLogger(__name__)
MAX_ALONE = 0.25  # share of the matrices that the base may lack: added tokens change one or two, another model most


class FineTuned(Source):
    """A fine-tuned model, read together with the public one.

    Args:
        tuned: the model to protect. public: directory, .gguf file or hub id. weights: names of the tensors to compare.
        others: names of the rest of the model's tensors.

    Raises:
        UnsupportedModelError: `public` is not the base of this model, or is the model itself.
    """

    def __init__(self, tuned: Source, public: str, weights: Iterable[str], others: Iterable[str]) -> None:
        self.config, self.origin = tuned.config, tuned.origin
        self._tuned = tuned
        self._base = open_source(public)
        weights = sorted(set(weights))
        with fake_mode():
            skeleton = self._base.skeleton()
        if self._base.renamed(skeleton) or set(weights) - self._base.names():
            self._base = self._base.whole()
        self._alone = {name for name in weights if not self._fits(name)}
        if len(self._alone) > MAX_ALONE * len(weights):
            raise UnsupportedModelError(
                f"{public} is not the base of this model: its {min(self._alone)} is missing or differs in shape."
            )
        if self._alone:
            logger.warning(
                "the base has no such matrix, or one of another shape; protected as without a base: %s",
                ", ".join(sorted(self._alone)),
            )
        if all(self._same(name) for name in [*weights, *sorted(set(others))]):
            raise UnsupportedModelError(
                f"{public} is this model itself, not the base of it: nothing would be hidden; split without --base."
            )

    def names(self) -> set[str]:
        return self._tuned.names()

    def dtype(self, name: str) -> torch.dtype:
        return self._tuned.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tuned.shape(name)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        return self._tuned.read(name, part, parts)

    def load(self) -> Any:
        return self._tuned.load()

    def public(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor | None:
        """The same piece of the public model; None if that has no such matrix."""
        return None if name in self._alone else self._base.read(name, part, parts)

    def _fits(self, name: str) -> bool:
        return name in self._base.names() and self._base.shape(name) == self._tuned.shape(name)

    def _same(self, name: str) -> bool:
        """Whether the two differ by no more than the rounding to the coarser of their types: a converted copy."""
        if not self._fits(name):
            return False
        ours, theirs = self._tuned.read(name), self._base.read(name)
        if ours.is_floating_point() and theirs.is_floating_point():
            coarser = max(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            ours, theirs = ours.to(coarser), theirs.to(coarser)
        return torch.equal(ours, theirs)


def divide(
    weight: torch.Tensor,
    rank: int,
    camouflage: bool,
    generator: torch.Generator,
    public: torch.Tensor | None = None,
    eps: float = 0.0,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The trusted part A (N, r), B (r, K) of `weight` (N, K), r = `trusted_rank`, and the edge's part (N, K); float32.

    Merging a LoRA rounds its result to the checkpoint's type, whose machine epsilon is `eps`. That noise depends on
    D, so where D is of low rank but for it, the noise is dropped: the model is then exact to its own rounding.

    `factors`: A and B of an earlier split, to be used again (`split.again`).
    """
    if public is None:
        a, b = factors or low_rank(weight, leading(weight, rank, generator), camouflage)
        return a, b, torch.addmm(weight, a, b, alpha=-1)
    difference = weight - public
    if factors:
        a, b = factors
    else:
        u, s, vt, _ = leading(difference, trusted_rank(rank, weight.shape[0], weight.shape[1], camouflage), generator)
        a, b = u * s, vt
    left = float((difference - a @ b).norm())
    if left <= 0.1 * float(difference.norm()) and left <= max(eps, 4e-6) / 4 * float(weight.norm()):
        return a, b, public
    a, b = factors or low_rank(difference, leading(difference, rank, generator), camouflage)
    return a, b, torch.addmm(weight, a, b, alpha=-1)


def divide_anywhere(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `divide`, but what the trusted part of rank `rank` takes are random directions: it protects nothing."""
    basis = torch.linalg.qr(torch.randn(weight.shape[1], rank))[0]
    a, b = rounded(weight @ basis, basis.T)
    return a, b, torch.addmm(weight, a, b, alpha=-1)
