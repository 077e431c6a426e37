"""What every block and layer of a model is worth: its perplexity without it, or without its leading components, which
are what the trusted side keeps (SLIP, arXiv 2407.10886, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sliplm.planner.ablation import Subject

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BlockWorth:
    """Perplexities with one block changed: `skipped`; with `random` matrices; `all` its matrices without so many
    leading components (by their number); and one of its `layers`, by name and number."""

    skipped: float
    random: float
    all: dict[int, float]
    layers: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Worth:
    """Of a model: its perplexity as it is, `original`, on `tokens` tokens of text; and by block."""

    model: str
    tokens: int
    ranks: list[int]
    original: float
    blocks: list[BlockWorth]


def measure(
    model: str,
    ranks: Sequence[int] = (4, 16, 64),
    text_file: Path | None = None,
    tokens: int = 512,
    progress: Progress | None = None,
) -> Worth:
    """Measure `model`, whole, in float32.

    Args:
        ranks: how many leading components to take away, each in turn.
        text_file: UTF-8 text; the Python documentation if absent.
        progress: called with (measurements done, in all).

    Raises:
        SlipError: the model cannot be read or does not continue text, or the text cannot be read or is too short.
    """
    subject = Subject(model, text_file, tokens)
    original = subject.perplexity()
    total = sum(2 + len(ranks) * (1 + len(layers)) for layers in subject.layers)
    done = 0

    def measured() -> float:
        nonlocal done
        found = subject.perplexity()
        done += 1
        if progress:
            progress(done, total)
        return found

    blocks = []
    for number, layers in enumerate(subject.layers):
        factors = {name: subject.factors(found, max(ranks)) for name, found in layers.items()}
        with subject.from_block(number):
            with subject.skipped(number):
                skipped = measured()
            with subject.random(number):
                random = measured()
            every, each = {}, {name: dict[int, float]() for name in layers}
            for rank in ranks:
                with ExitStack() as changed:
                    for name, found in layers.items():
                        changed.enter_context(subject.without(found, factors[name], rank))
                    every[rank] = measured()
                for name, found in layers.items():
                    with subject.without(found, factors[name], rank):
                        each[name][rank] = measured()
        blocks.append(BlockWorth(skipped, random, every, each))
    return Worth(Path(model).name, subject.windows.numel(), list(ranks), original, blocks)
