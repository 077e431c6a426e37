"""Memory that is used again: never while somebody looks at it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sliplm.pads.buffers import Buffers


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_nobody_looks_at_it() -> None:
    buffers = Buffers()
    first = buffers.array(16, 100)
    where = address(first)
    view = first[3:5]
    del first
    assert address(buffers.array(16, 100)) != where  # the view is part of it
    del view
    again = buffers.array(10, 100)
    assert address(again) == where and again.shape == (10, 100)
    assert again.flags.c_contiguous and again.dtype == np.uint32


def test_a_small_array_takes_no_large_ones_memory() -> None:
    buffers = Buffers()
    large = address(buffers.array(100, 100))
    assert address(buffers.array(10, 100)) != large


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([3, 7, 50]), st.integers(0, 5)), max_size=40))
def test_what_is_held_stays_as_it_was_and_memory_is_bounded(steps: list[tuple[int, int, int]]) -> None:
    buffers, held, most = Buffers(), [], 0
    for number, (rows, columns, drop) in enumerate(steps):
        array = buffers.array(rows, columns)
        array[:] = number
        held.append((number, array[rows // 2 :]))
        del array
        # A view keeps all of its array, which is at most twice what was asked for.
        most = max(most, sum(view.base.size for _, view in held))
        assert sum(a.size for a in buffers._all) <= most
        for number, view in held:
            assert (view == number).all()
        del view
        held = held[drop:]
