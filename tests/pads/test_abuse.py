"""Makers and edges that are out for harm: they cost what is theirs, and nobody else's."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from sliplm import prg
from sliplm.errors import BusyError
from sliplm.pads import pool as pool_module
from sliplm.pads.pad import Batch
from sliplm.pads.pool import Pool

SHAPES = [(8, 8)]


class Maker:
    def __init__(self, name: str, party: str) -> None:
        self.name, self.parties = name, frozenset({party})

    def reject(self) -> None:
        raise AssertionError("it did nothing wrong")


def finish(pool: Pool, maker: Maker, timeout: float = 0) -> bool:
    """Whether there was a job, which is done."""
    job = pool.job(maker, timeout)
    if job is not None:
        pool.deliver(job, np.zeros((job.count, 8), np.uint32))
    return job is not None


def test_what_an_edge_waits_for_fills_no_stock_that_it_may_not_use() -> None:
    """A device that is edge and helper asks for long prompts while nobody else makes pads."""
    pool = Pool(SHAPES, depth=64, patience=0.5)
    pool.expected = 1
    maker = Maker("both", "e")
    pool.hire(maker)
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            finish(pool, maker, 0.05)

    def want() -> None:
        with pytest.raises(BusyError):
            pool.take(0, 128, "e")

    making = threading.Thread(target=make)
    wanting = [threading.Thread(target=want) for _ in range(16)]
    for thread in (making, *wanting):
        thread.start()
    for thread in wanting:
        thread.join()
    stop.set()
    making.join()
    assert pool.level <= 64


def test_what_comes_late_does_not_overfill_the_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight connections of one device take the same jobs one after the other, and bring all of them at once."""
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.02)
    pool = Pool(SHAPES, depth=64)
    pool.expected = 1
    links, jobs = [Maker("h", "h") for _ in range(8)], []
    for link in links:
        pool.hire(link)
        for _ in range(2):
            if (job := pool.job(link, 0)) is not None:
                jobs.append(job)
            time.sleep(0.03)
    assert len(jobs) > 2
    for job in jobs:
        pool.deliver(job, np.zeros((job.count, 8), np.uint32))
    assert pool.level == 64


def test_who_stalls_and_comes_back_does_not_keep_others_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.05)
    pool = Pool(SHAPES, depth=64)
    pool.expected = 1
    honest = Maker("honest", "x")
    pool.hire(honest)
    for life in range(3):
        stalling = Maker("stalling", "x")
        pool.hire(stalling)
        assert pool.job(stalling, 0) is not None
        if not life:
            time.sleep(0.1)  # the first time it is believed
        assert finish(pool, honest), f"life {life}"
        pool.dismiss(stalling)
        pool.take(0, pool.level, "edge")


def test_nobody_counts_on_who_has_stalled_until_it_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.05)
    pool = Pool(SHAPES, depth=64)
    pool.expected = 1
    slow, honest = Maker("slow", "x"), Maker("honest", "x")
    pool.hire(slow), pool.hire(honest)
    assert pool.job(slow, 0) is not None and pool.job(honest, 0) is None  # it is believed
    time.sleep(0.1)
    late, timely = pool.job(slow, 0), pool.job(honest, 0)
    assert late is not None and timely is not None
    pool.deliver(timely, np.zeros((timely.count, 8), np.uint32))
    assert pool.level == 64
    pool.deliver(late, np.zeros((late.count, 8), np.uint32))
    pool.take(0, 64, "edge")
    assert pool.job(slow, 0) is not None and pool.job(honest, 0) is None  # it is believed again


def test_a_lack_of_memory_does_not_shift_the_rows_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = prg.fresh_key()
    batch = Batch(Maker("h", "h"), [key], 64, 8, np.zeros((64, 8), np.uint32))
    room, failures = prg._room, iter([MemoryError()])

    def fails_once(size: int) -> np.ndarray:
        if error := next(failures, None):
            raise error
        return room(size)

    monkeypatch.setattr(prg, "_room", fails_once)
    with pytest.raises(MemoryError):
        batch.mask(0, 16)
    assert (batch.mask(16, 16) == prg.expand(key, 16, 16, 8)).all()
    assert (batch.mask(0, 16) == prg.expand(key, 0, 16, 8)).all()


def test_levels_can_be_read_while_parties_arrive() -> None:
    pool, failed, over = Pool(SHAPES * 3, depth=4), list[Exception](), threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                assert pool.level >= 0
            except RuntimeError as error:
                failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(500):
        maker = Maker(f"p{i}", f"p{i}")
        pool.hire(maker)
        pool.job(maker, 0)
        pool.dismiss(maker)
    over.set()
    reader.join()
    sys.setswitchinterval(interval)
    assert not failed
