"""What the edge part of a fine-tune tells a thief who has the public base.

Threat model: the thief has the public model, the edge bundle, and no oracle. No change of basis hides singular values,
so it gives the base's matrices the singular values of the bundle, in the base's own directions: W = W0 V diag(s / s0)
V^T. What the split does to values (rows of unknown scale, the diagonal, rounding, what camouflage plants) it takes off
by comparing with a split of the public base that it makes itself. Source: the correspondence is Umeyama's (PAMI 1988);
the rest is ours. Oracles: any; with scales and blinding given, the edge's part itself is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from sliplm.attacks import matrices
from sliplm.attacks.stolen import Oracles, Stolen, guess_scales
from sliplm.split.base import divide
from sliplm.split.blinding import Blinding, blind
from sliplm.split.camouflage import trusted_rank
from sliplm.split.factors import leading
from sliplm.split.groups import Group, blocks
from sliplm.split.planes import dequantise, quantise

Matrix = Callable[[int, Group], torch.Tensor]


def share(base: float, thief: float, tuned: float) -> float:
    """Of the gain of a fine-tune from perplexity `base` to `tuned`, what a thief with perplexity `thief` has."""
    return float(np.log(base / thief) / np.log(base / tuned))


def direct(stolen: Stolen, public: Any, based: bool, scales: bool = False) -> Matrix:
    """Guesses of a group's matrix (N, K): the public one with the bundle's singular values.

    Args:
        based: the bundle is of a split with `public` as its base. scales: the true scales of rows are given.
    """

    def guess(number: int, group: Group) -> torch.Tensor:
        known = _stack(public, group)
        ours = _split_alone(known, number, group, stolen, based, scales)
        with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
            theirs = stolen.matrix(number, group, Oracles(scales=scales), file, 1.0)
        values, vectors = _spectrum(known)
        ratio = (_spectrum(theirs)[0] / _spectrum(ours)[0].clamp_min(1e-12)).clamp(0.5, 2)  # the smallest are noise
        if not scales:  # sizes are unknown: the whole keeps its own
            ratio = ratio / ratio.median()
        if not based:  # the leading values are not in the bundle; the others are mixed with planted ones
            rank = stolen.plan[number].rank
            place = np.linspace(0, len(values) - 1, len(values) - rank)
            below = np.interp(place, np.arange(len(values)), ratio.numpy())
            ratio = torch.cat([torch.ones(rank), torch.from_numpy(below).float()])
        turn = (vectors * (ratio - 1)) @ vectors.T
        return known + (known @ turn if len(turn) == known.shape[1] else turn @ known)

    return guess


def known_edge(stolen: Stolen, public: Any, based: bool) -> Matrix:
    """With scales and blinding given: the edge's part; in a split without a base, and what the base has of the rest."""

    def guess(number: int, group: Group) -> torch.Tensor:
        known = _stack(public, group)
        with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
            edge = stolen.matrix(number, group, Oracles(scales=True, blinding=True), file, 1.0)
        for m, rows, columns in () if based else blocks(group):
            rank = trusted_rank(stolen.plan[number].rank, m.rows, m.columns, stolen.settings["camouflage"])
            u, s, vt, _ = leading(known[rows, columns] - edge[rows, columns], rank, torch.Generator().manual_seed(0))
            edge[rows, columns] += (u * s) @ vt
        return edge

    return guess


def assemble(stolen: Stolen, public: Any, matrix: Matrix, weight: float = 1.0) -> Any:
    """A copy of `public` whose matrices are moved by `weight` of the way to those that `matrix` gives."""
    model = copy.deepcopy(public)
    with torch.no_grad():
        for number, group in enumerate(stolen.groups(public)):
            guessed = matrix(number, group)
            for m, rows, columns in blocks(group):
                whole = model.get_parameter(m.weight)
                if whole is model.get_input_embeddings().weight:  # a tied head: what the thief reads is the head's
                    layer = m.weight.rpartition(".")[0]
                    whole = torch.nn.Parameter(whole.clone())
                    model.get_submodule(layer).weight = whole
                own = m.matrix(whole.view(m.parts, -1)[m.part])
                own += weight * (guessed[rows, columns] - own)
    return model


def _stack(model: Any, group: Group) -> torch.Tensor:
    """The group's matrix of `model` (N, K)."""
    return torch.cat([matrices.weight(model, m) for m in group])


def _split_alone(
    known: torch.Tensor, number: int, group: Group, stolen: Stolen, based: bool, scales: bool
) -> torch.Tensor:
    """What the thief reads of a split of the public matrix that it makes itself (N, K)."""
    edge, plan, planted = known.clone(), stolen.plan[number], stolen.settings["camouflage"]
    generator = torch.Generator().manual_seed(0)
    for _, rows, columns in () if based else blocks(group):
        edge[rows, columns] = divide(known[rows, columns], plan.rank, planted, generator)[2]
    if stolen.settings["blinding"]:
        edge = blind(edge, Blinding.random(edge.shape[1]), Blinding.random(edge.shape[0]))
    q, true = quantise(edge, plan.planes)
    return dequantise(q, true if scales else guess_scales(q, plan.planes, 1.0))


def _spectrum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (d,), descending, and the singular vectors (d, d) of the shorter side."""
    short = (matrix if len(matrix) >= matrix.shape[1] else matrix.T).double()
    squares, vectors = torch.linalg.eigh(short.T @ short)
    return squares.clamp_min(0).sqrt().flip(0).float(), vectors.flip(1).float()
