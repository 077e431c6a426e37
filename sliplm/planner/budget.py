"""`auto:BUDGET`: which blocks to mask so that what remains open is worth least, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sliplm.errors import SlipError
from sliplm.planner import shapes, units
from sliplm.planner.ablation import Subject
from sliplm.planner.costs import Network, Pass, Split, cost, factors, placed
from sliplm.planner.shapes import Block, Model
from sliplm.planner.speeds import USUAL, Speeds
from sliplm.split.places import Place

Progress = Callable[[int, int], None]
Choice = tuple[float, float, frozenset[int]]
"""What it costs, what it is worth, which blocks it masks."""

ROUNDING = 1e-9
CONTEXT = 512  # tokens before the one that a budget of time is for


@dataclass(frozen=True)
class Prices:
    """What places cost in the unit of a budget: of every block `masked` and `open`; of a `run` of open blocks, once;
    and of what is in no block, `around`, if all blocks are masked and if not."""

    masked: Sequence[float]
    open: Sequence[float]
    run: float
    around: tuple[float, float]

    def of(self, masked: frozenset[int]) -> float:
        """The cost of a plan that masks these blocks."""
        count = len(self.masked)
        runs = sum(b not in masked and (b == 0 or b - 1 in masked) for b in range(count))
        each = (self.masked[b] if b in masked else self.open[b] for b in range(count))
        return sum(each) + runs * self.run + self.around[len(masked) < count]


def choose(gains: Sequence[float], prices: Prices, limit: float) -> frozenset[int]:
    """The blocks to mask so that the sum of their `gains` (at least 0) is largest and `prices.of` them within `limit`;
    none if nothing is. Of several best choices, one of the cheapest.

    From block to block only those choices are kept that none is both cheaper and better than, apart for each way in
    which they may go on; so the result is the best of all, and with blocks of few kinds that is little work.
    """
    kept: dict[tuple[bool, bool], list[Choice]] = {(False, False): [(0.0, 0.0, frozenset())]}
    for block, gain in enumerate(gains):
        longer: dict[tuple[bool, bool], list[Choice]] = {}
        for (open_before, any_open), choices in kept.items():
            for price, worth, masked in choices:
                opened = price + prices.open[block] + (0.0 if open_before else prices.run)
                longer.setdefault((True, True), []).append((opened, worth, masked))
                taken = (price + prices.masked[block], worth + gain, masked | {block})
                longer.setdefault((False, any_open), []).append(taken)
        kept = {state: _best(choices, limit) for state, choices in longer.items()}
    ended = [
        (worth, -price - prices.around[any_open], masked)
        for (_, any_open), choices in kept.items()
        for price, worth, masked in choices
        if price + prices.around[any_open] <= limit * (1 + ROUNDING)
    ]
    return max(ended, key=lambda choice: choice[:2])[2] if ended else frozenset()


def _best(choices: list[Choice], limit: float) -> list[Choice]:
    """Those within the limit that no other one is both cheaper and better than."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c[0], -c[1])):
        if choice[0] <= limit * (1 + ROUNDING) and (not found or choice[1] > found[-1][1]):
            found.append(choice)
    return found


def prices(model: Model, kind: str, split: Split, speeds: Speeds, network: Network) -> Prices:
    """What places cost in the unit of a budget of this `kind` (`units.Budget`), of one decoded token."""

    def price(blocks: Sequence[Block], where: Sequence[Place], around: bool = False) -> float:
        part = replace(model, blocks=tuple(blocks), around=model.around if around else ())
        if kind == "trusted share":
            known = {"masked": lambda g: factors(g, split.rank), "trusted": lambda g: g.weights, "open": lambda _: 0}
            return float(sum(g.used * known[place](g) for g, place in placed(part, where))) / model.multiply_adds
        found = cost(part, where, Pass(before=CONTEXT), split, speeds, network)
        return found.round_trips if kind == "round trips" else found.seconds

    block = model.blocks[0]
    another = price([block] * 2, ["open"] * 2) - price([block], ["open"])
    run = price([block] * 3, ["open", "masked", "open"]) - price([block] * 2, ["open", "masked"]) - another
    base = (price([], []), price([block], ["open"]) - another - run)  # of a pass, if all blocks are masked and if not
    around = [price([block], [place], True) - price([block], [place]) for place in ("masked", "open")]  # type: ignore[list-item]
    kinds = {b: (price([b], ["masked"]) - base[0], price([b], ["open"]) - base[1] - run) for b in set(model.blocks)}
    masked, opened = zip(*(kinds[b] for b in model.blocks), strict=True)
    return Prices(masked, opened, run, (base[0] + around[0], base[1] + around[1]))


def auto(
    model: str,
    text: str,
    split: Split | None = None,
    network: Network | None = None,
    speeds: Speeds = USUAL,
    text_file: Path | None = None,
    progress: Progress | None = None,
) -> list[Place]:
    """The places that the plan `text`, "auto:BUDGET", chooses for the blocks of `model`: masked or open.

    A block's gain is how much the perplexity grows (its logarithm) when the leading components of its matrices are
    taken away. Gains of several blocks do not simply add up, so the choice by their sum is measured, as are the longest
    plans first:N and last:N within the budget, and what leaves the open rest and the edge's part worst is taken.

    Raises:
        SlipError: `text` is no budget, or leaves no block masked; the model or the text cannot be read.
    """
    split, network = split or Split(), network or Network()
    wanted = units.budget(text)
    shape = shapes.read(model)
    known = prices(shape, wanted.kind, split, speeds, network)
    count = len(shape.blocks)
    least = min(known.of(frozenset([b])) for b in range(count))
    if least > wanted.limit * (1 + ROUNDING):
        raise SlipError(f"the budget {text} leaves no block masked: {_said(least, wanted.kind)} are the least for one.")
    subject = Subject(model, text_file, 512)
    original = subject.perplexity()
    parts = [{name: subject.factors(f, split.rank) for name, f in layers.items()} for layers in subject.layers]

    def without(masked: frozenset[int]) -> float:
        with ExitStack() as changed:
            for b in masked:
                for name, found in subject.layers[b].items():
                    changed.enter_context(subject.without(found, parts[b][name], split.rank))
            return subject.perplexity()

    def affordable(masked: frozenset[int]) -> bool:
        return known.of(masked) <= wanted.limit * (1 + ROUNDING)

    gains = []
    for b in range(count):
        gains.append(max(0.0, math.log(without(frozenset([b])) / original)))
        if progress:
            progress(b + 1, count)
    plain = [[frozenset(range(n)) for n in range(1, count + 1)], [frozenset(range(n, count)) for n in range(count)]]
    longest = [max(filter(affordable, plans), key=len, default=frozenset[int]()) for plans in plain]
    best = max({choose(gains, known, wanted.limit), *longest} - {frozenset[int]()}, key=without)
    return ["masked" if b in best else "open" for b in range(count)]


def _said(value: float, kind: str) -> str:
    if kind == "round trips":
        return f"{value:.0f} round trips"
    return f"{1e3 * value:.3g} milliseconds" if kind == "seconds" else f"{value:.2%} of the model"
