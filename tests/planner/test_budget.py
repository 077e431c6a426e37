"""`auto:BUDGET`: the best choice there is, within the budget."""

from __future__ import annotations

import math
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny

from sliplm.errors import SlipError
from sliplm.planner import budget, shapes
from sliplm.planner.ablation import Subject
from sliplm.planner.budget import Prices, auto, choose, prices
from sliplm.planner.costs import Network, Pass, Split, cost
from sliplm.planner.predict import Work, of
from sliplm.planner.speeds import USUAL
from sliplm.split.places import Place

SIXTY_FOURTHS = st.integers(0, 640).map(lambda n: n / 64)  # exact, whatever the order in which they are added
SHAPES = st.integers(1, 7)


def exhaustive(gains: list[float], known: Prices, limit: float) -> float:
    """The most that any choice within the limit gains; -1 if there is none."""
    blocks = range(len(gains))
    choices = (frozenset(c) for size in range(len(gains) + 1) for c in combinations(blocks, size))
    return max((sum(gains[b] for b in c) for c in choices if known.of(c) <= limit), default=-1.0)


@settings(max_examples=200)
@given(st.data())
def test_no_choice_is_better(data: st.DataObject) -> None:
    count = data.draw(SHAPES)
    each = st.lists(SIXTY_FOURTHS, min_size=count, max_size=count)
    gains, known = data.draw(each), Prices(data.draw(each), data.draw(each), data.draw(SIXTY_FOURTHS), (
        data.draw(SIXTY_FOURTHS), data.draw(SIXTY_FOURTHS)
    ))  # fmt: skip
    limit = data.draw(st.integers(0, 3000).map(lambda n: n / 64))
    best, found = exhaustive(gains, known, limit), choose(gains, known, limit)
    if best > 0:
        assert known.of(found) <= limit and sum(gains[b] for b in found) == best
    else:
        assert sum(gains[b] for b in found) == 0


def test_runs_of_open_blocks_are_counted() -> None:
    known = Prices([4.0] * 6, [0.0] * 6, 1.0, (1.0, 0.0))
    assert choose([1, 9, 9, 1, 1, 2], known, 9) == {0, 1}  # the best two lie between two runs of open blocks
    assert choose([1, 9, 9, 1, 1, 2], known, 10) == {1, 2}
    assert choose([1, 9, 9, 1, 1, 2], known, 25) == set(range(6))
    assert choose([1] * 6, known, 4) == set()


@pytest.fixture(scope="module")
def shape(tiny: Path) -> shapes.Model:
    return shapes.read(str(tiny))


@pytest.mark.parametrize("kind", ["round trips", "seconds", "trusted share"])
@pytest.mark.parametrize("where", [["masked", "masked"], ["masked", "open"], ["open", "masked"]])
def test_prices_are_those_of_whole_plans(kind: str, where: list[Place], shape: shapes.Model) -> None:
    network = Network(0.02, 1e6)
    known = prices(shape, kind, Split(4, 2), USUAL, network)
    found = known.of(frozenset(b for b, place in enumerate(where) if place == "masked"))
    whole = cost(shape, where, Pass(before=budget.CONTEXT), Split(4, 2), USUAL, network)
    if kind == "trusted share":
        assert found == pytest.approx(of(shape, "", where, Work(), Split(4, 2), USUAL, network).trusted_share)
    else:
        assert found == pytest.approx(whole.round_trips if kind == "round trips" else whole.seconds)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["auto:9rt", "auto:10rt"])
def test_the_measured_choice_is_the_worst_for_a_thief(text: str, tmp_path: Path) -> None:
    """On a model of four blocks, against all plans within the budget, each measured."""
    model = str(save_tiny(tmp_path / "model", num_hidden_layers=4))
    split = Split(4, 2)
    where = auto(model, text, split)
    known = prices(shapes.read(model), "round trips", split, USUAL, Network())
    chosen = frozenset(b for b, place in enumerate(where) if place == "masked")
    limit = float(text[5:-2])
    assert 0 < known.of(chosen) <= limit and set(where) <= {"masked", "open"}
    subject = Subject(model, None, 512)

    def worth(masked: frozenset[int]) -> float:
        with ExitStack() as changed:
            for b in masked:
                for found in subject.layers[b].values():
                    changed.enter_context(subject.without(found, subject.factors(found, 4), 4))
            return math.log(subject.perplexity())

    first = worth(frozenset({0, 1}))
    assert worth(chosen) >= first - 1e-6  # at least as bad as first:2, which has that budget


def test_a_budget_that_nothing_meets(tiny: Path) -> None:
    with pytest.raises(SlipError, match="auto:4rt leaves no block masked: 5 round trips are the least"):
        auto(str(tiny), "auto:4rt")
    with pytest.raises(SlipError, match="leaves no block masked"):
        auto(str(tiny), "auto:1us")
    with pytest.raises(SlipError, match="is no budget"):
        auto(str(tiny), "auto:all")


def test_all_blocks_if_the_budget_allows_it(tiny: Path) -> None:
    calls: list[Any] = []
    found = auto(str(tiny), "auto:100rt", Split(4, 2), progress=lambda *args: calls.append(args))
    assert found == ["masked"] * 2 and calls == [(1, 2), (2, 2)]
