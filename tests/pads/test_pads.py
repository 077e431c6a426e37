"""Pads: uniform, correct, never the same one twice, and never of a maker who may know the edge's data."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import pool_of
from makers import SHAPES, Helper, matrices

from sliplm.errors import BundleError, BusyError, LinkError
from sliplm.pads import pool as pool_module
from sliplm.pads.pad import Batch, Pad, Part
from sliplm.pads.pool import Pool
from sliplm.pads.sources import SelfSource
from sliplm.pads.stock import Job
from sliplm.prg import expand, fresh_key


def test_an_image_is_q_times_its_mask() -> None:
    group = matrices((7, 5))
    pad = pool_of(group, depth=0).take(0, 3, None)
    assert np.array_equal(pad.image, group[0].product(pad.mask()))


@pytest.mark.parametrize("keys", [1, 2])
def test_a_batch_gives_the_rows_of_its_keys_in_any_order(keys: int) -> None:
    own = [fresh_key() for _ in range(keys)]
    images = np.arange(40 * 3, dtype=np.uint32).reshape(40, 3)
    batch = Batch(SelfSource([]), own, 40, 5, images)
    whole = sum(expand(key, 0, 40, 5).astype(object) for key in own) % (2**31 - 1)
    for first, count in ((0, 1), (1, 3), (30, 10), (4, 20), (39, 1), (0, 40)):
        assert batch.mask(first, count).tolist() == whole[first : first + count].tolist()
        assert batch.image(first, count).tolist() == images[first : first + count].tolist()


def test_where_nothing_is_masked_there_is_nothing_to_make() -> None:
    pool = pool_of([])
    pool.hire(pool.own)
    assert pool.job(pool.own, 0.01) is None and pool.level == 0


def test_a_pad_gives_its_mask_once() -> None:
    pad = pool_of(matrices((7, 5)), depth=0).take(0, 1, None)
    pad.mask()
    with pytest.raises(RuntimeError, match="used"):
        pad.mask()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pads_and_batches_cannot_be_copied(duplicate: Callable[[object], object]) -> None:
    pool = pool_of(matrices((7, 5)), depth=0)
    for thing in (pool.take(0, 1, None), pool.take(0, 1, None)._parts[0].batch):
        with pytest.raises(TypeError):
            duplicate(thing)


def test_no_secret_in_representations() -> None:
    key = b"k" * 32
    batch = Batch(SelfSource([]), [key], 2, 3, np.full((2, 3), 123456, np.uint32))
    pool = Pool(SHAPES)
    job = Job(Helper(pool, "a"), 0, 2)
    for thing in (batch, Part(batch, 0, 1), Pad([Part(batch, 0, 1)]), job, pool):
        assert "kkk" not in repr(thing) and "123456" not in repr(thing) and job.key.hex() not in repr(thing)


def test_concurrent_takers_never_share_a_pad() -> None:
    """Odd sizes split stored batches; the filler runs at the same time; every mask row must be new."""
    pool = pool_of(matrices(*SHAPES), depth=32, batch=5)
    pool.start()
    taken: list[np.ndarray] = []
    lock = threading.Lock()

    def taker(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            mask = pool.take(0, int(rng.integers(1, 9)), None).mask()
            with lock:
                taken.append(mask)

    threads = [threading.Thread(target=taker, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    pool.close()
    rows = np.concatenate(taken)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_pool_fills_to_its_depth_and_serves_from_it() -> None:
    pool = pool_of(matrices(*SHAPES), depth=10, batch=4)
    pool.start()
    assert pool.wait(10, timeout=30)
    assert pool.level == 10
    pool.close()
    with pytest.raises(RuntimeError):
        pool.take(0, 1, None)


@pytest.mark.slow
def test_a_process_may_end_while_its_pool_fills() -> None:
    code = (
        "import numpy as np; from sliplm import kernels; from sliplm.pads.pool import Pool;"
        "from sliplm.pads.sources import SelfSource;"
        "pool = Pool([(4000, 4000)], depth=1 << 20);"
        "pool.own = SelfSource([kernels.prepare(np.ones((4000, 4000), np.int8))]); pool.start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_no_pad() -> None:
    pool = pool_of(matrices((3, 6)), depth=0)
    child = os.fork()
    if child == 0:
        try:
            pool.take(0, 1, None)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_small_stock_is_filled_again() -> None:
    """Smaller than a batch, too."""
    pool = pool_of(matrices((3, 6)), depth=5)
    pool.start()
    for _ in range(3):
        assert pool.wait(5, 10)
        for _ in range(5):
            pool.take(0, 1, None)
        assert wait_for(lambda: pool.level == 5)
    pool.close()


def test_a_filler_that_fails_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.05)
    pool = pool_of(matrices((3, 6)), depth=8)
    whole, failures = pool.own.image, iter([MemoryError(), ValueError()])

    def image(*arguments: object) -> np.ndarray:
        if error := next(failures, None):
            raise error
        return whole(*arguments)

    monkeypatch.setattr(pool.own, "image", image)
    pool.start()
    assert pool.wait(8, 10)
    pool.close()


# --- helpers ------------------------------------------------------------------------------------------------


def test_helpers_fill_the_stock_of_their_party_each() -> None:
    pool = Pool(SHAPES, depth=20, batch=4)
    a, b = Helper(pool, "a"), Helper(pool, "b")
    a.fill()
    assert pool.level == 20 and a.take() is None
    b.fill()
    assert pool.level == 40
    pad = pool.take(0, 7, "a")
    assert np.array_equal(pad.image, b.matrices[0].product(pad.mask()))


def test_a_party_never_gets_its_own_pads() -> None:
    pool = Pool(SHAPES, depth=8, patience=0.05)
    a = Helper(pool, "a")
    a.fill()
    with pytest.raises(BusyError, match="no helper of another party than this edge's"):
        pool.take(0, 1, "a")
    assert pool.level == 8  # nothing was taken
    assert pool.take(0, 1, "b").mask().shape == (1, 6)
    with pytest.raises(BusyError, match="faster than the helpers make them"):
        pool.take(0, 9, "b")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd"), st.integers(1, 5)), max_size=30))
def test_whatever_the_order_no_pad_meets_its_makers_party(steps: list[tuple[str, str, int]]) -> None:
    """Helpers of three parties, edges of four, in any order; makers are told by what only they multiply with."""
    pool = Pool(SHAPES, depth=6, batch=2, patience=0.0)
    helpers = {party: Helper(pool, party) for party in "abc"}
    seen: list[bytes] = []
    for maker, edge, tokens in steps:
        if job := helpers[maker].take():
            helpers[maker].finish(job)
        try:
            pad = pool.take(0, tokens, edge)
        except BusyError:
            continue
        for part in pad._parts:
            assert edge not in part.batch.maker.parties
        seen += [row.tobytes() for row in pad.mask()]
    assert len(set(seen)) == len(seen)


def test_who_waits_keeps_no_pads_of_a_maker_that_is_dropped_meanwhile() -> None:
    """A machine that is revoked, and enrolled again as another party's edge, would meet pads that it has made."""
    pool = Pool(SHAPES, depth=4, patience=20)
    gone, honest = Helper(pool, "x", "gone"), Helper(pool, "y", "honest")
    gone.fill()
    got: list[Pad] = []
    thread = threading.Thread(target=lambda: got.append(pool.take(0, 30, "edge")))
    thread.start()
    assert wait_for(lambda: pool._short_of(honest.parties)[0] == 26)  # it has four already
    pool.drop("gone")
    while thread.is_alive():
        honest.fill()
    assert {part.batch.maker for part in got[0]._parts} == {honest} and got[0].mask().shape == (30, 6)


def test_without_makers_there_are_no_pads() -> None:
    with pytest.raises(LinkError, match="nobody makes one-time pads"):
        Pool(SHAPES).take(0, 1, "edge")


def test_taking_waits_for_a_helper() -> None:
    pool = Pool(SHAPES, depth=4, patience=20)
    helper = Helper(pool, "a")
    got: list[Pad] = []
    thread = threading.Thread(target=lambda: got.append(pool.take(0, 30, "b")))
    thread.start()
    assert wait_for(lambda: pool._short_of(helper.parties)[0] > 0)
    helper.fill()  # more than the depth: somebody waits for it
    thread.join(10)
    assert got and got[0].mask().shape == (30, 6)


def test_what_a_helper_that_is_gone_had_promised_is_made_by_others() -> None:
    pool = Pool(SHAPES, depth=4, batch=4)
    a, b = Helper(pool, "x", "a"), Helper(pool, "x", "b")
    jobs = [a.take(), a.take()]
    assert all(jobs) and b.take() is None
    pool.dismiss(a)
    b.fill()
    assert pool.level == 4
    a.finish(jobs[0])  # too late
    assert pool.level == 4


def test_what_a_stalled_helper_had_promised_is_made_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.05)
    pool = Pool(SHAPES, depth=4, batch=4)
    a, b = Helper(pool, "x", "a"), Helper(pool, "x", "b")
    job = a.take()
    a.take()
    assert job and b.take() is None
    time.sleep(0.1)
    b.fill()
    assert pool.level == 4
    a.finish(job)  # late, right, and not lacking any more
    assert pool._totals() == [4, 4] and pool._stock(a).coming == [0, 0]


def test_a_liars_pads_are_all_dropped_and_only_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "JOB_ROWS", 4)
    pool = Pool(SHAPES, depth=16, batch=4)
    a, b = Helper(pool, "x", "a"), Helper(pool, "x", "b")
    for _ in range(2):  # for each group once from each
        for helper in (a, a, b, b):
            job = helper.take()
            assert job and job.count == 4
            helper.finish(job)
    assert pool._totals() == [16, 16]
    assert pool.drop("a") == 16 and pool._totals() == [8, 8]
    for group in (0, 1):
        pad = pool.take(group, 8, "y")
        assert {part.batch.maker for part in pad._parts} == {b}
    assert a.take() is None and a not in pool._makers


def test_blame_finds_the_part_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "JOB_ROWS", 2)
    pool = Pool(SHAPES, depth=4, batch=2)
    good, bad = Helper(pool, "x", "good"), Helper(pool, "x", "bad")
    right = good.matrices[0]
    while job := bad.take():
        pool.deliver(job, right.product(expand(job.key, 0, job.count, 6)) ^ 1 if job.group == 0 else images(job))
        if other := good.take():
            good.finish(other)
    pad = pool.take(0, pool._totals()[0], "y")
    pad.mask()
    pad.blame(lambda r, image: bool((right.product(r) == image).all()))
    assert bad.rejected and not good.rejected


def images(job: Job) -> np.ndarray:
    return np.zeros((job.count, SHAPES[job.group][0]), np.uint32)


def test_a_wrong_image_of_our_own_is_an_end() -> None:
    with pytest.raises(BundleError, match="damaged"):
        SelfSource([]).reject()


def wait_for(true: Callable[[], bool]) -> bool:
    """Whether it comes true, which nobody asks the pool for."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False
