"""A cache with room to grow holds what Transformers' own does, whatever is done to it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from sliplm.trusted.cache import GrowingLayer, grow

OPERATIONS = ("append", "append many", "crop", "reorder", "select", "repeat", "copy", "reset", "leave inference")


@given(st.lists(st.sampled_from(OPERATIONS), max_size=12), st.integers(0, 70))
def test_it_holds_what_transformers_holds(operations: list[str], prompt: int) -> None:
    torch.manual_seed(0)
    plain, growing = DynamicCache(), DynamicCache()
    inference = True

    def append(length: int) -> None:
        rows = len(plain.layers[0].keys) if plain.layers and plain.layers[0].is_initialized else 3
        keys, values = torch.randn(2, rows, 2, length, 4).unbind()
        with torch.inference_mode(inference):
            want = plain.update(keys, values, 0)
            got = growing.update(keys, values, 0)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

    append(prompt + 1)
    grow(growing, 0)
    assert isinstance(growing.layers[0], GrowingLayer)
    for operation in operations:
        ready = plain.layers[0].is_initialized
        if operation.startswith("append"):
            append(70 if operation.endswith("many") else 1)
        elif operation == "copy":
            kept, before = growing, growing.layers[0].keys
            before = None if before is None else before.clone()
            growing = copy.deepcopy(growing)
            append(1)
            after = kept.layers[0].keys
            assert after is before or torch.equal(after, before)  # what was copied is left alone
        elif operation == "leave inference":
            inference = False
        elif operation == "reset":
            plain.reset()
            growing.reset()
        elif ready:
            for cache in (plain, growing):
                if operation == "crop":
                    cache.crop(-1)
                elif operation == "reorder":
                    cache.reorder_cache(torch.arange(len(cache.layers[0].keys)).flip(0))
                elif operation == "select":
                    cache.batch_select_indices(torch.tensor([0]))
                elif operation == "repeat":
                    cache.batch_repeat_interleave(2)
        append(1)
    assert growing.get_seq_length() == plain.get_seq_length()


def test_a_step_copies_nothing_that_was_there_before() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5, 4), 0)
    grow(cache, 0)
    places = set()
    for _ in range(60):
        keys, _ = cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
        places.add(keys.data_ptr())
    assert len(places) == 1


def test_what_was_cut_off_is_not_written_over_while_somebody_has_it() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    grow(cache, 0)
    kept, _ = cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    cache.crop(-1)
    cache.update(torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1, 2), 7.0), 0)
    assert torch.equal(kept[0, 0, 3], torch.ones(2))


@pytest.mark.parametrize("index", [0, 1])
def test_caches_of_other_kinds_are_left_alone(index: int) -> None:
    class Other:
        pass

    grow(Other(), index)
    cache = DynamicCache()
    grow(cache, index)
    assert not cache.layers
