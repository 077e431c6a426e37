"""Attacks that look at single matrices or pairs of them, run over a whole bundle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from safetensors import safe_open

from sliplm.attacks import arrow, blinding, gram, subspace, unblinding
from sliplm.attacks.stolen import NONE, Oracles, Stolen
from sliplm.split.blinding import stored
from sliplm.split.factors import Factors, leading
from sliplm.split.groups import Group, blocks, size
from sliplm.split.layers import Member

_LARGEST = 4096  # subspaces are looked for in spaces of at most so many dimensions
_SAMPLE = 24  # groups, evenly spaced, in which subspaces are looked for
_FEW = 8  # groups that are compared with a public base: assignment is cubic in the number of columns
_NOISE = 0.02  # of the weights' standard deviation: how far the public base is from the original


def subspaces(stolen: Stolen, original: Any) -> dict[str, Any]:
    """What every detector finds, without blinding secrets and with them: mean overlap, and mean and worst in units of
    chance; on the shorter side of each matrix ("determined"), where a hole pins the subspace down, and on the other."""
    secret = [Oracles(scales=True)] + [Oracles(scales=True, blinding=True)] * stolen.settings["blinding"]
    scores: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for number, group in _some(stolen.groups(original), _SAMPLE):
            rank = stolen.plan[number].rank
            factors = [leading(weight(original, m), rank, torch.Generator().manual_seed(0)) for m in group]
            for oracles in secret:
                hidden = stolen.settings["blinding"] and not oracles.blinding
                matrix = stolen.matrix(number, group, oracles, file, 1.0)
                name = "without secrets" if oracles is secret[0] else "blinding secrets given"
                if hidden:  # members cannot be told apart: look for all their subspaces at once
                    inner, outer = stored(file.get_tensor, group[0].name)
                    u, v = _together(group, factors)
                    hidden_at = (b.apply(side.T.contiguous()).T for b, side in ((outer, u), (inner.dual(), v)))
                    jobs = [(matrix, *(torch.linalg.qr(side)[0] for side in hidden_at))]
                else:
                    parts = [matrix[rows, columns] for _, rows, columns in blocks(group)]
                    jobs = [(p, f.u, f.vt.T) for p, f in zip(parts, factors, strict=True)]
                for part, u, v in jobs:
                    for target, side in ((part, v), (part.T, u)):
                        count, space = side.shape[1], len(side)
                        if space > _LARGEST or count > min(target.shape) // 2:
                            continue
                        where = "determined" if target.shape[0] >= target.shape[1] else "other"
                        for detector, guess in subspace.find(target, count).items():
                            found = subspace.overlap(guess, side)
                            scores.setdefault((name, where, detector), []).append((found, found * space / count))
    result: dict[str, Any] = {}
    for (name, where, detector), values in scores.items():
        table = result.setdefault(name, {}).setdefault(where, {})
        overlaps, times = zip(*values, strict=True)
        table[detector] = {
            "overlap": sum(overlaps) / len(values),
            "times_chance": sum(times) / len(values),
            "worst": max(times),
        }
    return result


def neighbours(stolen: Stolen, original: Any) -> dict[str, Any]:
    """Columns of consecutive groups that read the residual stream, matched: how well, on average."""
    groups = stolen.groups(original)
    width = original.config.hidden_size
    # Groups of several members read the stream (q, k, v; gate, up); the head's rows are too many to be worth it.
    readers = [i for i, g in enumerate(groups) if len(g) > 1 and size(g)[1] == width][:_SAMPLE]
    shares = []
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for i, j in pairwise(readers):
            a, b = (stolen.matrix(n, groups[n], NONE, file, 1.0) for n in (i, j))
            secret = [
                stored(file.get_tensor, groups[n][0].name)[0] if stolen.settings["blinding"] else None for n in (i, j)
            ]
            shares.append(blinding.recovered(a, b, (secret[0], secret[1]))[0])
    return {"columns_matched": sum(shares) / max(1, len(shares)), "chance": 1 / width}


def public_base(stolen: Stolen, original: Any) -> dict[str, Any]:
    """What a public model that is as close as the original plus 2 % noise gives away of the basis: rows matched by
    their directions, columns by Gram matrices; singular directions lined up (mean squared cosine), and how far the
    rotation is undone from there (correlation). Means over groups."""
    scores: dict[str, list[float]] = {name: [] for name in ("rows", "columns", "directions", "rotation", "chance")}
    generator = torch.Generator().manual_seed(0)
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for number, group in _some(stolen.groups(original), _FEW):
            rank = stolen.plan[number].rank
            rows, columns = size(group)
            if max(rows, columns) > _LARGEST:
                continue
            base, rest, cut = (torch.empty(rows, columns) for _ in range(3))
            for m, at, across in blocks(group):
                w = weight(original, m)
                base[at, across] = w + _NOISE * w.std() * torch.randn(w.shape, generator=generator)
                rest[at, across] = gram.without_leading(base[at, across], rank)
                cut[at, across] = gram.without_leading(base[at, across], rank, filled=False)
            inner, outer = stored(file.get_tensor, group[0].name) if stolen.settings["blinding"] else (None, None)
            matrix = stolen.matrix(number, group, NONE, file, 1.0)
            scores["rows"].append(arrow.identified(matrix, base, outer))
            scores["columns"].append(gram.columns(matrix, rest, inner))
            if inner is None or outer is None:  # there is nothing to undo
                lined_up, undone = 1.0, 1.0
            else:
                guess = unblinding.attack(matrix, cut, planted=stolen.settings["camouflage"])
                lined_up, _, undone = guess.score(inner, outer)
            scores["directions"].append(lined_up)
            scores["rotation"].append(undone)
            scores["chance"].append(1 / columns)
    return {name: sum(values) / max(1, len(values)) for name, values in scores.items()}


def weight(model: Any, m: Member) -> torch.Tensor:
    """The original matrix (N, K), float32."""
    whole = model.get_parameter(m.weight).detach()
    return m.matrix(whole.view(m.parts, -1)[m.part]).float()


def _some(groups: list[Group], count: int) -> Iterator[tuple[int, Group]]:
    count = min(count, len(groups))
    for i in range(count):
        number = (2 * i + 1) * len(groups) // (2 * count)  # the head, last, is not among them unless all are
        yield number, groups[number]


def _together(group: Group, factors: list[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of all members' left and right subspaces, in the coordinates of the group's matrix."""
    rows, columns = size(group)
    left, right = [], []
    for (_, at, across), f in zip(blocks(group), factors, strict=True):
        left.append(torch.zeros(rows, len(f.s)))
        right.append(torch.zeros(columns, len(f.s)))
        left[-1][at], right[-1][across] = f.u, f.vt.T
    return torch.linalg.qr(torch.cat(left, 1))[0], torch.linalg.qr(torch.cat(right, 1))[0]
