"""Keys to field elements: uniform, byte-exact, any rows without the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm import prg
from sliplm.field import P
from sliplm.prg import expand, fresh_key, uniform

VECTORS = json.loads((Path(__file__).parents[1] / "protocol" / "vectors.json").read_text("utf-8"))["pads"]


def by_the_book(key: bytes, row: int, width: int) -> list[int]:
    """docs/protocol.md, word by word, with the cipher on single blocks."""
    block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = (width + 3) // 4 + 1
    stream = b"".join(block.update((row * blocks + i).to_bytes(16, "big")) for i in range(blocks))
    words = [int.from_bytes(stream[i : i + 4], "little") % 2**31 for i in range(0, len(stream), 4)]
    spare = [w for w in words[width:] if w != P]
    return [spare.pop(0) if w == P else w for w in words[:width]]


@settings(max_examples=60, deadline=None)
@given(key=st.binary(min_size=32, max_size=32), first=st.integers(0, 2**32 - 40), width=st.integers(1, 70))
def test_rows_are_those_of_the_specification(key: bytes, first: int, width: int) -> None:
    rows = expand(key, first, 3, width)
    assert rows.dtype == np.uint32 and rows.tolist() == [by_the_book(key, first + i, width) for i in range(3)]


def test_rows_longer_than_a_chunk_are_continuous() -> None:
    key, width = fresh_key(), (len(prg._ZEROS) // 4) + 37
    rows = expand(key, 1, 2, width)
    assert rows[1].tolist() == expand(key, 2, 1, width)[0].tolist()
    assert rows[0, -40:].tolist() == by_the_book(key, 1, width)[-40:]


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_vectors(vector: dict) -> None:
    key = bytes.fromhex(vector["key"])
    rows = expand(key, vector["first"], len(vector["rows"]), vector["width"])
    assert rows.tolist() == vector["rows"]
    assert rows.tolist() == [by_the_book(key, vector["first"] + i, vector["width"]) for i in range(len(rows))]


def test_a_vector_has_a_rejection() -> None:
    """Once in 2^31 elements: found by search, or no test would ever see one."""
    rejected = 0
    for v in VECTORS:
        blocks = (v["width"] + 3) // 4 + 1
        block = Cipher(algorithms.AES256(bytes.fromhex(v["key"])), modes.ECB()).encryptor()
        for row in range(v["first"], v["first"] + len(v["rows"])):
            stream = b"".join(block.update((row * blocks + i).to_bytes(16, "big")) for i in range(blocks))
            words = np.frombuffer(stream, "<u4")[: v["width"]] & P
            rejected += int((words == P).sum())
    assert rejected >= 1


def test_many_rejections_take_the_spare_words_in_order_and_too_many_are_refused() -> None:
    row = np.array([P, 5, P, 7], np.uint32)
    prg._replace(row, np.array([11, 13, 17], np.uint32))
    assert row.tolist() == [11, 5, 13, 7]
    with pytest.raises(ValueError, match="too many"):
        prg._replace(np.array([P, P], np.uint32), np.array([1], np.uint32))


@pytest.mark.parametrize(
    ("key", "first", "count", "width"),
    [
        (bytes(31), 0, 1, 1),
        (bytes(32), -1, 1, 1),
        (bytes(32), 0, 0, 1),
        (bytes(32), 0, 1, 0),
        (bytes(32), 2**32 - 1, 2, 1),
    ],
)
def test_what_are_no_rows_is_refused(key: bytes, first: int, count: int, width: int) -> None:
    with pytest.raises(ValueError, match="no rows of a key"):
        expand(key, first, count, width)


def test_elements_are_uniform_and_canonical() -> None:
    values = uniform(1 << 11, 1 << 10).reshape(-1)
    assert values.max() < P
    for bits in (values >> 23, values & 0xFF, (values >> 11) & 0xFF):
        counts = np.bincount(bits, minlength=256)
        expected = len(values) / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 400  # 255 degrees of freedom: exceeded once in 10^8 runs


def test_keys_are_fresh_and_rows_differ() -> None:
    assert len({fresh_key() for _ in range(1000)}) == 1000
    rows = uniform(100, 8)
    assert len(np.unique(rows, axis=0)) == 100 and not (rows == uniform(100, 8)).all(axis=1).any()


class Scripted:
    """A cipher whose keystream is given."""

    def __init__(self, words: list[int]) -> None:
        self.stream = np.array(words, "<u4").tobytes()

    def update_into(self, data: memoryview, into: memoryview) -> None:
        into[: len(data)], self.stream = self.stream[: len(data)], self.stream[len(data) :]


@pytest.mark.parametrize("high", [0, 1 << 31])  # the bit that is not used
def test_spare_words_that_are_rejected_themselves_are_left_out(high: int) -> None:
    rows = prg.Rows(bytes(32), 0, 3)
    rows._cipher = Scripted([w | high for w in (P, 5, P, P, 11, P, 13, 17, 1, 2, 3, 4, 5, 6, 7, 8)])  # type: ignore[assignment]
    assert rows.take(2).tolist() == [[11, 5, 13], [1, 2, 3]]


def test_rows_that_are_taken_one_after_the_other_know_where_they_are() -> None:
    key = fresh_key()
    rows = prg.Rows(key, 2**32 - 5, 7)
    for first, count in ((2**32 - 5, 3), (2**32 - 2, 1)):
        assert rows.next == first and (rows.take(count) == expand(key, first, count, 7)).all()
    with pytest.raises(ValueError, match="no rows of a key"):
        rows.take(2)
