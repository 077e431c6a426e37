"""Which rows go to which edge, against every way there is; and what is learned of an edge's speed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.exchange import shares as module
from sliplm.exchange.shares import NEW, ROWS, SIZE, Line, Speed, shares, spread

LINES = st.lists(st.tuples(st.just(0.0) | st.floats(0, 10), st.floats(1e-6, 1)), min_size=1, max_size=4)


def slowest(lines: list[Line], rows: list[int]) -> float:
    return max(a + b * n for (a, b), n in zip(lines, rows, strict=True) if n)


@given(LINES, st.integers(1, 9))
def test_no_way_of_spreading_is_done_earlier(lines: list[Line], rows: int) -> None:
    found = spread(lines, rows)
    assert sum(found) == rows and min(found) >= 0
    ways = itertools.product(range(rows + 1), repeat=len(lines))
    best = min(slowest(lines, list(way)) for way in ways if sum(way) == rows)
    assert slowest(lines, found) <= best * (1 + 1e-9)


@given(LINES, st.integers(1, 5000))
def test_no_row_is_lost_and_moving_one_does_not_help(lines: list[Line], rows: int) -> None:
    found = spread(lines, rows)
    assert sum(found) == rows and min(found) >= 0
    end = slowest(lines, found)
    assert all(a + b * (n + 1) >= end * (1 - 1e-9) for (a, b), n in zip(lines, found, strict=True))


@given(LINES, st.integers(1, 300))
def test_one_edge_gets_all_unless_spreading_gains(lines: list[Line], rows: int) -> None:
    found = shares(lines, rows)
    alone = min(a + b * rows for a, b in lines)
    assert sum(found) == rows
    if sum(n > 0 for n in found) > 1:
        assert alone > module.GAIN * slowest(lines, found) + module.HANDING_SECONDS
    else:
        assert slowest(lines, found) == alone <= module.GAIN * slowest(lines, spread(lines, rows)) * (1 + 1e-9) + 3e-4


def test_one_row_is_never_spread_and_an_equal_edge_halves_a_prompt() -> None:
    assert shares([(1.0, 1.0), (0.5, 0.1)], 1) == [0, 1]
    assert shares([(0.01, 0.001)] * 2, 1000) == [500, 500]
    assert shares([(0.01, 0.0001)] * 2, 16) in ([16, 0], [0, 16])  # reading the matrix takes most of it


@pytest.mark.parametrize("truth", [(2e-4, 5e-4, 1e-3), (0.05, 1e-4, 1e-3), (1e-5, 5e-4, 5e-3)])
def test_a_speed_is_learned_in_spite_of_noise(truth: tuple[float, float, float]) -> None:
    rng, speed = np.random.default_rng(1), Speed()

    def seconds(size: int, rows: int) -> float:
        return truth[0] + size / SIZE * (truth[1] + rows / ROWS * truth[2])

    for _ in range(600):
        size, rows = int(rng.choice([1 << 19, 1 << 21, 1 << 23])), int(rng.choice([1, 1, 1, 8, 128]))
        speed.learn(size, rows, seconds(size, rows) * rng.uniform(0.9, 1.1))
    for size, rows in itertools.product([1 << 19, 1 << 21, 1 << 23], [1, 16, 128]):
        a, b = speed.line(size)
        assert a + b * rows == pytest.approx(seconds(size, rows), rel=0.35)


def test_the_first_exchange_tells_something_and_a_hiccup_little() -> None:
    speed = Speed()
    speed.learn(SIZE, 1, 1.0)
    a, b = speed.line(SIZE)
    assert a + b == pytest.approx(1.0) and not speed.known
    for _ in range(NEW):
        speed.learn(SIZE, 1, 1.0)
    speed.learn(SIZE, 1, 1000.0)
    a, b = speed.line(SIZE)
    assert a + b < 1.3


@given(st.lists(st.tuples(st.integers(1, 1 << 28), st.integers(1, 2000), st.floats(0, 100)), max_size=40))
def test_no_part_of_a_speed_is_negative(seen: list[tuple[int, int, float]]) -> None:
    speed = Speed()
    for size, rows, seconds in seen:
        speed.learn(size, rows, seconds)
    a, b = speed.line(1 << 20)
    assert 0 <= a < 1e3 and 0 < b < 1e3
