"""Pads: uniform, correct, and never the same one twice."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from loading import pool_of

from sliplm import kernels
from sliplm.field import P
from sliplm.pads.pool import Pad
from sliplm.pads.prg import Stream


def matrices(*shapes: tuple[int, int]) -> list[kernels.IntMatrix]:
    rng = np.random.default_rng(0)
    return [kernels.prepare(rng.integers(-127, 128, s).astype(np.int8)) for s in shapes]


def test_elements_are_uniform_and_canonical() -> None:
    values = Stream().elements(1 << 21)
    assert values.max() < P
    for bits in (values >> 23, values & 0xFF, (values >> 11) & 0xFF):
        counts = np.bincount(bits, minlength=256)
        expected = len(values) / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 400  # 255 degrees of freedom: exceeded once in 10^8 runs


def test_the_value_p_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed the sampler words that are all ones (p after masking): they must be drawn again, not mapped."""
    stream = Stream()
    script = [
        np.array([0xFFFFFFFF, 5, 0x7FFFFFFF, 0x80000007], np.uint32),
        np.array([0x7FFFFFFF, 9], np.uint32),
        np.array([P - 1], np.uint32),
    ]
    monkeypatch.setattr(Stream, "words", lambda self, count: script.pop(0))
    assert stream.elements(4).tolist() == [P - 1, 5, 9, 7]
    assert not script


def test_streams_differ_and_never_repeat() -> None:
    a, b = Stream(), Stream()
    first = a.elements(1000)
    assert not np.array_equal(first, a.elements(1000))
    assert not np.array_equal(first, b.elements(1000))


def test_the_keystream_is_continuous_across_chunks() -> None:
    words = Stream().words((1 << 20) + 37)
    assert len(np.unique(words.reshape(-1)[: 1 << 20])) > 0.999 * (1 << 20)
    assert not np.array_equal(words[:37], words[-37:])


def test_an_image_is_q_times_its_mask() -> None:
    group = matrices((7, 5))
    pool = pool_of(group, depth=0)
    pad = pool.take(0, 3)
    mask = pad.mask()
    assert np.array_equal(pad.image, group[0].product(mask))


def test_a_pad_gives_its_mask_once() -> None:
    pad = pool_of(matrices((7, 5)), depth=0).take(0, 1)
    pad.mask()
    with pytest.raises(RuntimeError, match="used"):
        pad.mask()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pads_and_streams_cannot_be_copied(duplicate: object) -> None:
    pool = pool_of(matrices((7, 5)), depth=0)
    for thing in (pool.take(0, 1), Stream()):
        with pytest.raises(TypeError):
            duplicate(thing)  # type: ignore[operator]


def test_no_secret_in_representations() -> None:
    pad = Pad(np.arange(3, dtype=np.uint32)[None], np.arange(2, dtype=np.uint32)[None])
    assert repr(pad) == "Pad(<secret>)" and repr(Stream()) == "Stream(<secret>)"


def test_concurrent_takers_never_share_a_pad() -> None:
    """Odd sizes split stored batches; the filler runs at the same time; every mask row must be new."""
    pool = pool_of(matrices((3, 6), (4, 2)), depth=32, batch=5)
    pool.start()
    taken: list[np.ndarray] = []
    lock = threading.Lock()

    def taker(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            mask = pool.take(0, int(rng.integers(1, 9))).mask()
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
    pool = pool_of(matrices((3, 6), (4, 2)), depth=10, batch=4)
    pool.start()
    assert pool.wait(10, timeout=30)
    assert pool.level == 10
    pool.close()
    with pytest.raises(RuntimeError):
        pool.take(0, 1)


@pytest.mark.slow
def test_a_process_may_end_while_its_pool_fills() -> None:
    code = (
        "import numpy as np; from sliplm import kernels; from sliplm.pads.pool import Pool;"
        "from sliplm.pads.sources import SelfSource;"
        "pool = Pool([(4000, 4000)], depth=1 << 20);"
        "pool.source = SelfSource([kernels.prepare(np.ones((4000, 4000), np.int8))]); pool.start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_no_pad() -> None:
    pool = pool_of(matrices((3, 6)), depth=0)
    stream = Stream()
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (lambda: pool.take(0, 1), lambda: stream.words(1)):
            try:
                use()
            except RuntimeError:
                refused += 1
        os._exit(0 if refused == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_small_stock_is_filled_again() -> None:
    """Smaller than a batch, too."""
    pool = pool_of(matrices((3, 6)), depth=5)
    pool.start()
    for _ in range(3):
        assert pool.wait(5, 10)
        for _ in range(5):
            pool.take(0, 1)
        assert wait_for(lambda: pool.level == 5)
    pool.close()


def wait_for(true: Any) -> bool:
    """Whether it comes true, which nobody asks the pool for."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False
