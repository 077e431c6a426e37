"""`slip bench`, and what waits, forgets and chooses threads for the sake of speed. No test asserts a time."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import pool_of

from sliplm import _core, kernels
from sliplm.bundle import EdgeBundle, QFile
from sliplm.edge.multiplier import Multiplier
from sliplm.split.model import Options, split_model
from sliplm.split.writer import TensorWriter

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_the_bench_measures_a_random_model(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "sliplm.cli",
        "bench",
        "llama-tiny",
        "--planes",
        "2",
        "--tokens",
        "8",
        "--rounds",
        "1",
    ]
    line += [
        "--prefill",
        "20",
        "--long",
        "1000",
        "--keep",
        str(tmp_path / "keep"),
        "--plot",
        str(tmp_path / "plot.svg"),
        "--json",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["model"] == "llama-tiny" and result["planes"] == 2
    contenders = {"bf16", "fp32", "tls", "in process", "tls, pads included"}
    assert set(result["decode"]) == contenders
    assert all(d["ms"] > 0 and d["ms_p10"] <= d["ms_p90"] for d in result["decode"].values())
    assert result["decode"]["bf16"]["times_bf16"] == 1
    shapes = EdgeBundle.open(tmp_path / "keep" / "llama-tiny-planes2-rank16" / "edge").shapes
    assert result["per_token"]["round_trips"] == len(shapes) == 9
    assert result["per_token"]["bytes_sent"] > sum(4 * k for _, k in shapes)
    weights = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 160 * 64) + 512 * 64
    assert result["multiply_adds"]["unprotected"] == weights == sum(m * k for m, k in shapes) / 2
    assert {"send", "wait", "receive", "low-rank"} < set(result["exchange_us"]["tls"])
    assert result["memory"]["edge_bundle"] > 2 * weights and result["memory"]["edge"] > 1e7
    assert result["growth"]["tokens"] == 1000 and result["growth"]["edge"] < 20e6
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_the_bench_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sliplm.cli", "bench", str(tmp_path / "nothing"), "--rounds", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "nothing" in done.stderr


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
def test_waiting_for_input_ends_with_input_with_the_end_and_with_the_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sleep, spin in ((1000.0, 0.0), (0.0, 1000.0), (500.0, 500.0), (-50.0, 100.0)):
            assert not _core.native.wait_readable(ours.fileno(), sleep, spin)
        for sleep, spin in ((30e6, 0.0), (0.0, 30e6), (1000.0, 30e6)):
            threading.Timer(0.05, theirs.send, [b"x"]).start()
            assert _core.native.wait_readable(ours.fileno(), sleep, spin)
            ours.recv(1)
        theirs.close()
        assert _core.native.wait_readable(ours.fileno(), 30e6, 0.0)
        assert _core.native.wait_readable(ours.fileno(), 0.0, 30e6)


def test_a_forgotten_matrix_reads_the_same(tmp_path: Path, tiny: Path) -> None:
    split_model(str(tiny), tmp_path / "bundle", Options(rank=2))
    bundle = EdgeBundle.open(tmp_path / "bundle" / "edge")
    for group in range(len(bundle.shapes)):
        before = bundle.matrix(group).copy()
        bundle.forget(group)
        assert np.array_equal(bundle.matrix(group), before)
    engine = Multiplier.from_bundle(bundle)
    for rows in (1, 4, 5):
        x = np.random.default_rng(rows).integers(0, 2**31 - 1, (rows, bundle.shapes[0][1])).astype(np.uint32)
        exact = x.astype(object) @ bundle.matrix(0).T.astype(object) % (2**31 - 1)
        assert (engine.product(0, x) == exact).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what the kernel says of a mapping")
def test_forgetting_a_matrix_lets_its_memory_go(tmp_path: Path) -> None:
    path, shape = tmp_path / "q.safetensors", (1024, 4096)
    writer = TensorWriter(path, {name: (torch.int8, shape) for name in "01"})
    for name in "01":
        writer.write(name, torch.ones(shape, dtype=torch.int8))
    writer.close()
    q = QFile(path, [shape, shape])

    def held() -> float:
        entry = Path("/proc/self/smaps").read_text().partition(str(path))[2]
        return int(entry.partition("Rss:")[2].split()[0]) / 4096  # kB, to matrices

    assert q.matrix(0).sum() == q.matrix(1).sum() == 4 << 20
    assert held() > 1.9
    q.forget(0)
    assert 0.8 < held() < 1.2
    q.forget(1)
    assert held() < 0.2


def test_two_can_wait_for_different_levels_of_one_pool() -> None:
    rng = np.random.default_rng(0)
    pool = pool_of([kernels.prepare(rng.integers(-127, 128, (6, 5)).astype(np.int8))], 20, batch=8)
    reached: list[bool] = []
    waiting = threading.Thread(target=lambda: reached.append(pool.wait(20, 30)), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert not pool.wait(1, 0.05)  # nobody fills yet; whoever gives up does not take the other's wish along
    pool.start()
    try:
        waiting.join(20)
        assert reached == [True]
    finally:
        pool.close()


def test_a_pool_that_is_switched_off_stays_as_it_is_and_can_be_waited_for_again() -> None:
    rng = np.random.default_rng(0)
    pool = pool_of([kernels.prepare(rng.integers(-127, 128, (6, 5)).astype(np.int8)) for _ in range(2)], 20, batch=8)
    pool.start()
    try:
        assert pool.wait(20, 30) and pool.level >= 20
        pool.resize(0)
        pool.take(0, 3, None)
        time.sleep(0.05)
        assert pool.level == 17
        pool.resize(20)
        pool.take(1, 1, None)
        assert pool.wait(20, 30) and pool.level >= 20
    finally:
        pool.close()
