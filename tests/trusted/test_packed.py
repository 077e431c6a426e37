"""Many sequences in one pass of the common layout: rows that do not know of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loading import attached

from sliplm import _core
from sliplm.trusted.packed import Packed, Part

pytestmark = pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")


@pytest.fixture(scope="module")
def way(tiny_split: Path) -> Packed:
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted")).eval()
    found = Packed.of(model)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


TEXTS = [list(range(5, 5 + n)) for n in (1, 7, 30, 2, 19)]


def alone(way: Packed, text: list[int]) -> torch.Tensor:
    return way.forward([Part(way.cache(), 0, text, 1)])[0]


def test_a_rows_logits_do_not_depend_on_the_company_bit_for_bit(way: Packed) -> None:
    got = way.forward([Part(way.cache(), 0, text, 1) for text in TEXTS])
    for text, row in zip(TEXTS, got, strict=True):
        assert torch.equal(row, alone(way, text))


def test_nor_on_the_parts_in_which_they_come(way: Packed) -> None:
    caches = [way.cache() for _ in TEXTS]
    known = [0] * len(TEXTS)
    found: set[int] = set()
    generator = np.random.default_rng(1)
    while len(found) < len(TEXTS):
        some = [i for i in range(len(TEXTS)) if known[i] < len(TEXTS[i]) and generator.random() < 0.6]
        ends = {i: int(generator.integers(known[i], len(TEXTS[i]))) + 1 for i in some}
        parts = [
            Part(caches[i], known[i], TEXTS[i][known[i] : e], int(generator.integers(e - known[i] + 1)))
            for i, e in ends.items()
        ]
        if not parts:
            continue
        way.forward([part._replace(tokens=[*part.tokens, 9, 9, 9]) for part in parts])  # guesses, all of them wrong
        rows = way.forward(parts).split([part.wanted for part in parts])  # a pass that is done again changes nothing
        known = [ends.get(i, k) for i, k in enumerate(known)]
        found |= {i for i, end in ends.items() if end == len(TEXTS[i])}
        for (i, end), some_rows in zip(ends.items(), rows, strict=True):
            for row, length in zip(some_rows, range(end - len(some_rows) + 1, end + 1), strict=True):
                assert torch.equal(row, alone(way, TEXTS[i][:length]))


def test_they_are_the_models_logits(way: Packed, tiny: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    for text, row in zip(TEXTS, way.forward([Part(way.cache(), 0, t, 1) for t in TEXTS]), strict=True):
        want = original(torch.tensor([text])).logits[0, -1]
        assert (row - want).abs().max() < 1e-3 * want.std()


def test_memory_follows_each_sequences_own_length(way: Packed) -> None:
    short, long = way.cache(), way.cache()
    way.forward([Part(short, 0, [5], 1), Part(long, 0, [7] * 120, 0)])
    assert short.array.shape[3] <= 65 and 120 <= long.array.shape[3] <= 184
    before = long.array
    way.forward([Part(long, 120, [7], 1)])
    assert long.array is before  # there was room
    long.reserve(1000)
    assert np.array_equal(long.array[:, :, :, :121], before[:, :, :, :121])


def test_a_pass_may_want_no_logits(way: Packed) -> None:
    assert not len(way.forward([Part(way.cache(), 0, [5, 6], 0)]))


def test_other_models_do_not_go_this_way() -> None:
    """Nothing of this one is protected."""
    config = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    assert Packed.of(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **config))) is None


@pytest.mark.parametrize("isa", _core.native.isas() if _core.native else [])
def test_ragged_attention_equals_torch(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layers, heads, groups, size = 2, 6, 2, 20
    lengths, rooms = (1, 40, 7), (3, 40, 20)
    memories = [torch.randn(layers, 2, groups, room, size, generator=generator) for room in rooms]
    owners = np.array([1, 0, 1, 2, 2, 1])  # rows in any order
    positions = np.array([38, 0, 39, 5, 6, 37])
    assert all(positions[owners == i].max() + 1 == n for i, n in enumerate(lengths))
    rows = torch.randn(len(owners), heads + 2 * groups, size, generator=generator)
    out = np.empty((len(owners), heads, size), np.float32)
    arrays = [m.numpy().copy() for m in memories]
    _core.native.Ragged(arrays, owners, positions).attend(1, rows.numpy(), 0.3, out, isa)
    for row, owner, position in zip(rows, owners, positions, strict=True):
        memories[owner][1, 0, :, position] = row[heads : heads + groups]
        memories[owner][1, 1, :, position] = row[heads + groups :]
    for array, memory in zip(arrays, memories, strict=True):
        assert np.array_equal(array, memory.numpy())  # written in place, and nothing else
    for r, (owner, position) in enumerate(zip(owners, positions, strict=True)):
        keys, values = memories[owner][1, :, :, : position + 1].double()
        want = torch.nn.functional.scaled_dot_product_attention(
            rows[r, :heads, None].double(), keys, values, scale=0.3, enable_gqa=True
        )
        assert np.allclose(out[r], want[:, 0].numpy(), atol=2e-6)


def test_what_does_not_fit_is_refused() -> None:
    native = _core.native
    memory = np.zeros((1, 2, 2, 5, 8), np.float32)
    for owners, positions in (([1], [0]), ([-1], [0]), ([0], [5]), ([0], [-1]), ([0, 0], [0])):
        with pytest.raises(ValueError, match=r"sequence|outside|shapes"):
            native.Ragged([memory], np.array(owners), np.array(positions))
    for others in ([], [memory, np.zeros((2, 2, 2, 5, 8), np.float32)], [np.zeros((1, 3, 2, 5, 8), np.float32)]):
        with pytest.raises(ValueError, match="shapes"):
            native.Ragged(others, np.array([0]), np.array([0]))
    rows = native.Ragged([memory], np.array([0]), np.array([4]))
    heads, out = np.zeros((1, 8, 8), np.float32), np.zeros((1, 4, 8), np.float32)
    rows.attend(0, heads, 1.0, out)
    for layer, given, to in ((1, heads, out), (0, heads[:, :7].copy(), out), (0, heads, out[:, :3].copy())):
        with pytest.raises(ValueError, match="shapes"):
            rows.attend(layer, given, 1.0, to)
