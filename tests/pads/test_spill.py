"""Pads on disk: unreadable, found out when they are changed, on a disk that may be full, in room that is used again."""

from __future__ import annotations

import copy
import errno
import itertools
import logging
import os
import pickle
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import pool_of
from makers import SHAPES, Helper, matrices

from sliplm.errors import BundleError
from sliplm.pads import spill as spill_module
from sliplm.pads.pool import Pool
from sliplm.pads.spill import Spill

RNG = np.random.default_rng(0)


def some(rows: int = 5, width: int = 7) -> np.ndarray:
    return RNG.integers(0, 2**31 - 1, (rows, width)).astype(np.uint32)


def on_disk(spill: Spill) -> bytes:
    size = os.fstat(spill._file.fileno()).st_size
    return os.pread(spill._file.fileno(), size, 0)


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    arrays = [some(rows, width) for rows, width in ((1, 1), (5, 7), (64, 100))]
    stored = [spill(array) for array in [*arrays, arrays[1][2:4]]]
    assert not list(tmp_path.iterdir())  # nothing that has a name
    assert spill.size == sum(4 * array.size + 16 for array in arrays) + 4 * 14 + 16
    for array, each in zip([*arrays, arrays[1][2:4]], stored, strict=True):
        assert np.array_equal(each.load(), array)
    assert spill.size == 0 and on_disk(spill) == b""


def test_the_file_shows_nothing(tmp_path: Path) -> None:
    """Nor does it show that the same was written twice."""
    spill = Spill(tmp_path)
    images = np.zeros((8, 32), np.uint32)
    first, second = spill(images), spill(images)
    seen = on_disk(spill)
    half = len(seen) // 2
    assert seen[:half] != seen[half:] and bytes(16) not in seen
    assert first._key not in seen and second._key not in seen and first._key != second._key


@pytest.mark.parametrize("byte", [0, 100, -1])
def test_a_changed_byte_is_found(tmp_path: Path, byte: int) -> None:
    spill = Spill(tmp_path)
    stored = spill(some())
    where = byte % stored._size
    os.pwrite(spill._file.fileno(), bytes([on_disk(spill)[where] ^ 1]), where)
    with pytest.raises(OSError, match="not what was written"):
        stored.load()


def test_what_lay_there_before_or_elsewhere_is_found(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    one, other = spill(some()), spill(some())
    old = on_disk(spill)
    size = len(old) // 2
    os.pwrite(spill._file.fileno(), old[size:] + old[:size], 0)  # swapped
    for stored in (one, other):
        with pytest.raises(OSError, match="not what was written"):
            stored.load()
    third = spill(some())
    os.pwrite(spill._file.fileno(), old[:size], 0)  # a backup is restored
    with pytest.raises(OSError, match="not what was written"):
        third.load()


def test_a_file_that_is_cut_is_found(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    stored = spill(some())
    os.ftruncate(spill._file.fileno(), 9)
    with pytest.raises(OSError, match="not there any more"):
        stored.load()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9), st.booleans()), max_size=40))
def test_room_is_used_again_and_never_twice_at_once(steps: list[tuple[int, int, bool]]) -> None:
    """Arrays of several sizes come; now and then one is loaded, or forgotten."""
    spill = Spill(tempfile.gettempdir())
    held: list[tuple[np.ndarray, object]] = []
    most = 0
    for rows, which, load in steps:
        array = some(rows, 3)
        held.append((array, spill(array)))
        taken = sorted((s._start, s._start + s._size) for _, s in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert spill.size == sum(end - start for start, end in taken)
        most = max(most, spill.size)
        if which < len(held):
            array, stored = held.pop(which)
            if load:
                assert np.array_equal(stored.load(), array)
            del stored
        assert len(on_disk(spill)) <= 2 * most + 100  # holes included
    while held:
        array, stored = held.pop()
        assert np.array_equal(stored.load(), array)
        del stored
    assert spill.size == 0 and on_disk(spill) == b""


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps, repr])
def test_what_is_stored_can_neither_be_copied_nor_shown(tmp_path: Path, duplicate: object) -> None:
    stored = Spill(tmp_path)(some())
    if duplicate is repr:
        assert stored._key.hex() not in repr(stored) and repr(stored._key) not in repr(stored)
        return
    with pytest.raises(TypeError):
        duplicate(stored)  # type: ignore[operator]


def test_a_directory_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in ("nowhere", "file"):
        with pytest.raises(BundleError, match=f"cannot be kept in .*{wrong}: (no such file|not a directory)"):
            Spill(tmp_path / wrong)


def test_a_full_disk_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path)
    kept, images = spill(some(500, 50)), some(500, 50)
    now = [1000.0]
    monkeypatch.setattr(spill_module.time, "monotonic", lambda: now[0])
    with full_at(spill.size + 50_000), caplog.at_level(logging.WARNING):  # half of it would find room
        for _ in range(3):
            with pytest.raises(OSError, match="too large"):
                spill(images)
    assert [r.message for r in caplog.records] == [
        "the stock of one-time pads cannot grow beyond 0 MB on disk (file too large); it grows again when there is room"
    ]
    assert spill.full and spill.size == 4 * 25_000 + 16 == len(on_disk(spill))
    now[0] += spill_module.RETRY_SECONDS
    assert not spill.full
    assert np.array_equal(spill(images).load(), images)
    kept.load()


# --- in a pool ----------------------------------------------------------------------------------------------


def spilling(tmp_path: Path, reserve: int, depth: int = 8) -> Pool:
    pool = Pool(SHAPES, depth=depth, batch=4, patience=0.2)
    pool.spill = spill = Spill(tmp_path)
    pool.reserve = lambda: 0 if spill.full else reserve
    return pool


def rows_of(pool: Pool, stored: bool) -> list[int]:
    return [sum(stock.rows(g, stored) for stock in pool._stocks.values()) for g in range(len(SHAPES))]


def test_a_stock_beyond_its_depth_lies_on_disk(tmp_path: Path) -> None:
    pool = spilling(tmp_path, 100)
    helper = Helper(pool, "a")
    helper.fill()
    assert pool.level == 100 and pool.stored == 92
    assert rows_of(pool, stored=False) == [8, 8]
    seen = []
    for tokens in (3, 5, 1, 20, 9, 62):
        pad = pool.take(0, tokens, "b")
        mask = pad.mask()
        assert np.array_equal(pad.image, helper.matrices[0].product(mask))
        seen.append(mask)
    rows = np.concatenate(seen)
    assert len(rows) == 100 == len(np.unique(rows, axis=0))


def test_what_is_loaded_again_takes_no_more_memory_than_the_depth(tmp_path: Path) -> None:
    pool = spilling(tmp_path, 200)
    helper = Helper(pool, "a")
    helper.fill()
    for _ in range(100):
        pool.take(0, 1, "b").mask()
        held = {id(p.batch): p.batch for p in pool._stocks[frozenset({"a"})].ready[0] if not p.batch.stored}
        assert sum(batch.count for batch in held.values()) <= 2 * 8


def test_pads_in_memory_go_first_and_are_made_again(tmp_path: Path) -> None:
    pool = spilling(tmp_path, 100)
    helper = Helper(pool, "a")
    helper.fill()
    for _ in range(5):
        pool.take(0, 6, "b")
        assert rows_of(pool, stored=True)[0] == 92
        helper.fill()
        assert rows_of(pool, stored=False)[0] == 8


@pytest.mark.parametrize("own", [False, True])
def test_a_damaged_batch_costs_no_request_and_nothing_of_it_is_used(
    tmp_path: Path, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = spilling(tmp_path, 40)
    helper = Helper(pool, "a")
    helper.fill()
    if own:
        pool.own = pool_of(matrices(*SHAPES)).own
    first = next(p.batch for p in pool._stocks[frozenset({"a"})].ready[0] if p.batch.stored)
    os.pwrite(pool.spill._file.fileno(), bytes(4), first._images._start)
    pad = pool.take(0, 20, "b")
    mask = pad.mask()
    assert np.array_equal(pad.image, helper.matrices[0].product(mask)) and len(mask) == 20
    assert first not in {part.batch for part in pad._parts}
    assert pool._totals()[0] == 40 - 20 - first.count
    assert "a batch of one-time pads is lost" in caplog.text


def test_a_full_disk_stops_the_stock_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = spilling(tmp_path, 10_000)
    helper = Helper(pool, "a")
    now = [1000.0]
    monkeypatch.setattr(spill_module.time, "monotonic", lambda: now[0])
    with full_at(60_000), caplog.at_level(logging.WARNING):
        helper.fill()  # ends: the target is what is in memory
        level, size = pool.level, pool.spill.size
        assert 8 < level < 10_000 and pool.target == 8 and len(caplog.records) == 1
        pad = pool.take(0, pool._totals()[0], "b")
        assert np.array_equal(pad.image, helper.matrices[0].product(pad.mask()))
        helper.fill()  # what is always kept ready is
        assert rows_of(pool, stored=False)[0] == 8 and pool.spill.size < size
        now[0] += spill_module.RETRY_SECONDS
        helper.fill()  # now there is room again
        assert pool.spill.size > size // 2 and pool.spill.full and len(caplog.records) == 1


def test_whoever_waits_gets_pads_though_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = spilling(tmp_path, 0)
    helper = Helper(pool, "a")
    write = os.pwrite

    def none_left(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", none_left)
    wait = pool.changed.wait

    def work(timeout: float) -> bool:
        helper.fill()
        return True

    monkeypatch.setattr(pool.changed, "wait", work)
    assert pool.take(0, 50, "b").mask().shape == (50, 6)
    monkeypatch.setattr(pool.changed, "wait", wait)
    monkeypatch.setattr(os, "pwrite", write)


def test_dropped_pads_give_their_room_back(tmp_path: Path) -> None:
    pool = spilling(tmp_path, 60)
    a, b = Helper(pool, "a"), Helper(pool, "b")
    a.fill()
    size = pool.spill.size
    b.fill()
    assert pool.spill.size == 2 * size
    assert pool.drop(a.name) == 120 and pool.spill.size == size
    pool.close()
    assert pool.spill.size == 0


@pytest.mark.slow
def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            spill(some())
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
