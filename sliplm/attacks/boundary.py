"""Learn the protected blocks from what crosses their border.

Threat model: some blocks are open, so hidden states pass the edge in the clear. The thief notes what goes into a run of
protected blocks and what comes out, and trains blocks of its own to do the same; they take the protected ones' place in
its copy of the model. It is given whatever it does not see: the embedding, the final norm and the head, and with them
what goes into the first block and comes out of the last. What decides is how many tokens it has seen, each of which it
may use many times. Source: SOLID, arXiv 2410.11182; the losses are those of Romero et al., FitNets, arXiv 1412.6550.

It starts from nothing (fresh weights), from a public base's blocks, or, of masked blocks, from the edge's part of them
in the thief's best case: every secret of scales and bases given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sliplm.attacks.training import Data, autocast, perplexity
from sliplm.open.blocks import block_list
from sliplm.split.base import divide
from sliplm.split.groups import find_layers
from sliplm.split.places import Place

RATES = (1e-3, 3e-3)
STEPS = 160  # of training, however few tokens the thief has seen: it goes over them again
SHARES = (1 / 16, 1 / 4, 1)  # of all tokens, points of the curve
WINDOWS = 2  # a step

Run = tuple[int, int]
"""Blocks from the first number up to, and without, the second."""


@dataclass(frozen=True)
class Border:
    """What the thief sees of a run of blocks: batches of hidden states that go in and come out, (WINDOWS, LENGTH, H);
    and what else each block takes, which follows from positions alone."""

    seen: list[tuple[torch.Tensor, torch.Tensor]]
    settings: list[dict[str, Any]]


def runs(where: Sequence[Place]) -> list[Run]:
    """The runs of protected blocks. None where nothing is open: then there is no border in the clear."""
    found, start = [], 0
    for is_open, places in groupby(where, key=lambda place: place == "open"):
        length = len(list(places))
        if not is_open:
            found.append((start, start + length))
        start += length
    return found if "open" in where else []


def attack(
    original: Any, where: Sequence[Place], data: Data, rank: int, base: Any = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Lines (see `lines.line`) by what the thief starts from. Their `tokens` are those that it has seen at the border.

    Args:
        original: the model, trimmed to `data.vocabulary`; it is left as it was.
        where: the place of every block.
        rank: of the masked blocks' trusted part.
        base: a public model of the same shape, if the thief has one.
    """
    place = block_list(original)
    blocks = original.get_submodule(place)
    starts: dict[str, Callable[[int], nn.Module]] = {"nothing": lambda b: _fresh(blocks[b], original, seed + b)}
    if "masked" in where:
        starts["edge part"] = lambda b: (
            _edge_part(blocks[b], rank) if where[b] == "masked" else _fresh(blocks[b], original, seed + b)
        )
    if base is not None:
        theirs = base.get_submodule(block_list(base))
        starts["public base"] = lambda b: copy.deepcopy(theirs[b])
    borders = [(run, observe(original, blocks, run, data.train)) for run in runs(where)]
    return {name: _line(original, blocks, borders, start, data) for name, start in starts.items()} if borders else {}


def observe(model: Any, blocks: nn.ModuleList, run: Run, windows: torch.Tensor) -> Border:
    """What crosses the border of `run` while `model` reads `windows` (n, LENGTH)."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    settings: dict[int, dict[str, Any]] = {}
    inputs: list[torch.Tensor] = []

    def into(number: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number == run[0]:
                inputs.append((args[0] if args else kwargs["hidden_states"]).clone())
            settings.setdefault(number, {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return note

    def out(_: nn.Module, __: Any, result: Any) -> None:
        seen.append((inputs.pop(), _hidden(result).clone()))

    hooks = [blocks[b].register_forward_pre_hook(into(b), with_kwargs=True) for b in range(*run)]
    hooks.append(blocks[run[1] - 1].register_forward_hook(out))
    with torch.no_grad():
        for ids in windows.split(WINDOWS):
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return Border(seen, [settings[b] for b in range(*run)])


def imitate(students: nn.ModuleList, border: Border, count: int, rate: float, seed: int) -> None:
    """Train `students` on the first `count` batches that were seen: AdamW, warm-up, decay to zero."""
    chosen = [p.requires_grad_() for p in students.parameters()]
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = STEPS // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.0, (STEPS - i) / (STEPS - warm)))
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(STEPS):
        order = order or torch.randperm(count, generator=generator).tolist()
        x, wanted = border.seen[order.pop()]
        with autocast():
            for block, settings in zip(students, border.settings, strict=True):
                x = _hidden(block(x, **settings))
        # Relative to each token's own length: a few tokens are hundreds of times as long as the others.
        error = ((x.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)).mean()
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()


def _line(
    original: Any,
    blocks: nn.ModuleList,
    borders: list[tuple[Run, Border]],
    start: Callable[[int], nn.Module],
    data: Data,
) -> dict[str, Any]:
    def stolen(share: float, rate: float) -> tuple[float, float]:
        """Perplexities, validation and held-out text, when the thief has seen that share of all tokens."""
        replaced: dict[int, nn.Module] = {}
        for run, border in borders:
            students = nn.ModuleList(start(b) for b in range(*run))
            if share:
                imitate(students, border, max(1, round(share * len(border.seen))), rate, 0)
            replaced |= dict(zip(range(*run), students, strict=True))
        with _replaced(blocks, replaced):
            return perplexity(original, data.valid), perplexity(original, data.held)

    searched = {rate: stolen(1, rate) for rate in RATES}
    rate = min(searched, key=lambda rate: searched[rate][0])
    curve = [stolen(0, rate)[1], *(stolen(share, rate)[1] for share in SHARES[:-1]), searched[rate][1]]
    return {
        "rate": rate,
        "searched": {f"{rate:g}": found[0] for rate, found in searched.items()},
        "valid": searched[rate][0],
        "tokens": [round(share * data.train.numel()) for share in (0, *SHARES)],
        "ppl": curve,
        "reached": curve[-1],
        "low": curve[-1],
        "high": curve[-1],
        "seeds": 1,
    }


@contextmanager
def _replaced(blocks: nn.ModuleList, others: dict[int, nn.Module]) -> Iterator[None]:
    kept = {b: blocks[b] for b in others}
    for b, other in others.items():
        blocks[b] = other
    try:
        yield
    finally:
        for b, block in kept.items():
            blocks[b] = block


def _fresh(block: nn.Module, model: Any, seed: int) -> nn.Module:
    """A block of this shape that knows nothing: random matrices, norms and biases as they are initialised."""
    made = copy.deepcopy(block)
    spread = getattr(model.config, "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() >= 2:
                p.copy_(spread * torch.randn(p.shape, generator=generator))
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return made


def _edge_part(block: nn.Module, rank: int) -> nn.Module:
    """The block with the edge's part in place of every matrix."""
    made = copy.deepcopy(block)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in (m for found in find_layers(made).values() for m in found):
            weight = m.matrix(made.get_parameter(m.weight).view(m.parts, -1)[m.part])
            weight.copy_(divide(weight.float().clone(), rank, True, generator)[2])
    return made


def _hidden(result: Any) -> torch.Tensor:
    """The hidden states that a block gives back, alone or first of several things."""
    found: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return found
