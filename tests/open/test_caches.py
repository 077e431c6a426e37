"""The caches of open blocks on an edge: what is kept, what is freed, and what is refused, with a model by the book."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_fakes import WIDTH, Sums, states

from sliplm.edge.open import CacheLimits, OpenBlocks
from sliplm.errors import BusyError, ProtocolError


def test_a_prompt_and_tokens_give_what_all_at_once_gives() -> None:
    blocks, x = OpenBlocks([Sums()]), states(10)
    whole = blocks.compute(0, 1, 0, x, keep=False)
    assert not blocks.requests
    parts = [blocks.compute(0, 2, 0, x[:6], keep=True)]
    parts += [blocks.compute(0, 2, i, x[i : i + 1], keep=True) for i in range(6, 10)]
    assert np.array_equal(np.concatenate(parts), whole) and blocks.requests == 1 and blocks.bytes == 1000
    blocks.forget(2)
    blocks.forget(2)
    assert not blocks.requests and not blocks.bytes


def test_positions_can_be_taken_back_where_the_cache_allows_it() -> None:
    blocks, x = OpenBlocks([Sums()]), states(6)
    blocks.compute(0, 1, 0, x, keep=True)
    again = blocks.compute(0, 1, 4, x[4:], keep=True)
    assert np.array_equal(again, np.cumsum(x, axis=0)[4:]) and blocks.bytes == 600
    sliding = OpenBlocks([Sums(crops=False)])
    sliding.compute(0, 1, 0, x, keep=True)
    with pytest.raises(BusyError, match="does not have the cache"):
        sliding.compute(0, 1, 4, x[4:], keep=True)
    assert not sliding.requests


@pytest.mark.parametrize("keep", [True, False])
def test_a_cache_that_is_not_there_is_one_sentence(keep: bool) -> None:
    blocks = OpenBlocks([Sums()])
    with pytest.raises(BusyError, match="does not have the cache of this request any more"):
        blocks.compute(0, 1, 5, states(1), keep)
    blocks.compute(0, 1, 0, states(4), keep=True)
    with pytest.raises(BusyError, match="any more"):
        blocks.compute(0, 1, 5, states(1), keep)
    assert not blocks.requests


def test_the_last_part_of_a_long_text_takes_the_cache_with_it() -> None:
    blocks, x = OpenBlocks([Sums()]), states(6)
    first, last = blocks.compute(0, 1, 0, x[:4], keep=True), blocks.compute(0, 1, 4, x[4:], keep=False)
    assert np.array_equal(np.concatenate([first, last]), np.cumsum(x, axis=0)) and not blocks.requests


def test_too_many_requests_are_refused_until_one_goes_or_is_idle() -> None:
    blocks = OpenBlocks([Sums()], CacheLimits(count=2, idle=0.05))
    for request in (1, 2):
        blocks.compute(0, request, 0, states(1), keep=True)
    with pytest.raises(BusyError, match="caches of 2 requests, and no room for another"):
        blocks.compute(0, 3, 0, states(1), keep=True)
    time.sleep(0.06)
    blocks.compute(0, 2, 1, states(1), keep=True)
    blocks.compute(0, 3, 0, states(1), keep=True)  # in the place of 1
    with pytest.raises(BusyError, match="any more"):
        blocks.compute(0, 1, 1, states(1), keep=True)
    assert blocks.compute(0, 2, 2, states(1), keep=True).shape == (1, WIDTH)


def test_a_cache_that_would_not_fit_is_refused_before_it_is_made() -> None:
    blocks = OpenBlocks([Sums()], CacheLimits(bytes=10 << 20))
    Sums.row_bytes = 1 << 20
    try:
        with pytest.raises(BusyError, match="does not fit: the edge's take 0 MB of 10 MB"):
            blocks.compute(0, 1, 0, states(11), keep=True)
        assert not blocks.bytes
    finally:
        Sums.row_bytes = 100


def test_one_in_use_is_never_freed_for_another() -> None:
    blocks = OpenBlocks([Sums()], CacheLimits(bytes=1000))
    blocks.compute(0, 1, 0, states(8), keep=True)
    with pytest.raises(BusyError, match="does not fit"):
        blocks.compute(0, 2, 0, states(3), keep=True)
    assert blocks.compute(0, 1, 8, states(2), keep=True).shape == (2, WIDTH)
    with pytest.raises(BusyError, match="does not fit"):
        blocks.compute(0, 1, 10, states(1), keep=True)


def test_running_out_of_memory_is_one_sentence_and_frees_the_cache() -> None:
    blocks = OpenBlocks([Sums()])
    blocks.compute(0, 1, 0, states(2), keep=True)
    with pytest.raises(BusyError, match="ran out of memory"):
        blocks.compute(0, 1, 2, np.full((1, WIDTH), np.nan, np.float32), keep=True)
    assert not blocks.requests


def test_rows_that_do_not_fit_are_refused() -> None:
    blocks = OpenBlocks([Sums()])
    for run, x in ((1, states(1)), (0, states(1)[:, :2]), (0, states(0))):
        with pytest.raises(ProtocolError, match="no open run"):
            blocks.compute(run, 1, 0, x, keep=True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans(), st.booleans()), max_size=40))
def test_limits_hold_and_answers_are_right_whatever_comes(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Each request as a list of its rows, beside the edge's; `idle` is never reached."""
    blocks = OpenBlocks([Sums()], CacheLimits(count=3, bytes=1000))
    known: dict[int, list[np.ndarray]] = {}
    for number, (request, count, keep, forget) in enumerate(steps):
        x, mine = states(count, number), known.get(request, [])
        try:
            y = blocks.compute(0, request, len(mine), x, keep)
        except BusyError:
            # Refused for room, which leaves what was there.
            assert (request not in known and len(known) == 3) or 100 * (sum(map(len, known.values())) + count) > 1000
            blocks.forget(request)
            known.pop(request, None)
            continue
        mine = [*mine, *x]
        assert np.array_equal(y, np.cumsum(mine, axis=0)[-count:])
        if keep:
            known[request] = mine
        else:
            known.pop(request, None)
        if forget:
            blocks.forget(request)
            known.pop(request, None)
        assert blocks.requests == len(known) <= 3 and blocks.bytes == 100 * sum(map(len, known.values())) <= 1000


def test_requests_may_be_forgotten_while_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = OpenBlocks([Sums()], CacheLimits(count=3, idle=-1.0))
    for request in range(3):
        blocks.compute(0, request, 0, states(1), keep=True)

    class Idle(type(blocks._kept[0])):  # type: ignore[misc]
        @property
        def used(self) -> float:  # another thread's turn
            blocks.forget(2)
            return 0.0

    monkeypatch.setattr(blocks._kept[0], "__class__", Idle)
    assert blocks.compute(0, 3, 0, states(1), keep=True).shape == (1, WIDTH)
