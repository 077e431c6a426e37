"""Exact products against integer arithmetic: every backend and instruction set this machine can run."""

import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm import _core, kernels
from sliplm.errors import UnsupportedModelError
from sliplm.field import HALF, P
from sliplm.kernels.native import NativeMatrix
from sliplm.kernels.portable import PortableMatrix

ISAS = _core.native.isas() if _core.native else []
MAKERS = {"portable": PortableMatrix} | {isa: (lambda q, isa=isa: NativeMatrix(q, isa)) for isa in ISAS}
COLUMNS = [1, 2, 3, 4, 63, 64, 65, 511, 512, 513, 576, 2048, 4095, 65535]


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def exact(q, x):
    """In int64: halves of x below 2^16, so sums below 2^16 * 2^7 * 2^16."""
    low = (x & 0xFFFF).astype(np.int64) @ q.T.astype(np.int64)
    high = (x >> 16).astype(np.int64) @ q.T.astype(np.int64)
    return (low + (high << 16)) % P


def sample(rows, cols, tokens):
    rng = np.random.default_rng([rows, cols, tokens])
    return (
        rng.integers(-128, 128, (rows, cols)).astype(np.int8),
        rng.integers(0, P, (tokens, cols)).astype(np.uint32),
    )


def test_the_reference_itself_against_python_integers():
    q, x = sample(3, 7, 2)
    for t in range(2):
        for m in range(3):
            assert exact(q, x)[t, m] == sum(int(a) * int(b) for a, b in zip(q[m], x[t], strict=True)) % P


@pytest.mark.parametrize("cols", COLUMNS)
def test_every_width(make, cols):
    rows = 17 if cols > 4096 else 100
    q, x = sample(rows, cols, 5)
    product = make(q).product(x)
    assert product.dtype == np.uint32 and product.shape == (5, rows)
    assert (product == exact(q, x)).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 48, 63, 64, 65, 960, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 33])
def test_every_height_and_number_of_tokens(make, rows, tokens):
    q, x = sample(rows, 70, tokens)
    assert (make(q).product(x) == exact(q, x)).all()


def test_more_tokens_than_one_pass_and_no_tokens(make):
    q, x = sample(80, 200, 251)
    matrix = make(q)
    assert (matrix.product(x) == exact(q, x)).all()
    assert matrix.product(x[:0]).shape == (0, 80)


@pytest.mark.parametrize("cols", [4, 513, 2048, 65535])
def test_extreme_values(make, cols):
    """Where an accumulator would overflow or saturate, if any could."""
    q = np.empty((8, cols), np.int8)
    q[:] = np.array([-128, 127, -127, 0, 1, -1, -128, 127])[:, None]
    q[6, ::2], q[7, 1::2] = 127, -128
    bytes_of_7_or_8_bits = [0x7F7F7F7F, 0x00FFFFFF, 0x7FFFFF00, 0x000000FF]
    words_of_16_bits = [0x00008000, 0x00007FFF, 0x3FFF8000, 0x40008000, P - 0x8000, P - 0x3FFF8000]
    values = [0, P - 1, P - 2, HALF, HALF + 1, *bytes_of_7_or_8_bits, *words_of_16_bits]
    x = np.empty((len(values), cols), np.uint32)
    x[:] = np.array(values)[:, None]
    assert (make(q).product(x) == exact(q, x)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_small_matrix(data):
    cols = data.draw(st.integers(1, 20))
    row = st.lists(st.integers(-128, 127), min_size=cols, max_size=cols)
    token = st.lists(st.integers(0, P - 1), min_size=cols, max_size=cols)
    q = data.draw(st.lists(row, min_size=1, max_size=20))
    x = data.draw(st.lists(token, min_size=1, max_size=7))
    want = [[sum(map(int.__mul__, a, b)) % P for a in q] for b in x]
    for maker in MAKERS.values():
        assert maker(np.array(q, np.int8)).product(np.array(x, np.uint32)).tolist() == want


def test_writes_into_out_and_refuses_one_that_does_not_fit(make):
    q, x = sample(40, 65, 3)
    matrix = make(q)
    out = np.full((3, 40), 7, np.uint32)
    assert matrix.product(x, out=out) is out
    assert (out == exact(q, x)).all()
    for bad in (np.empty((3, 41), np.uint32), np.empty((3, 40), np.int64), np.empty((40, 3), np.uint32).T):
        with pytest.raises(ValueError, match="out"):
            matrix.product(x, out=bad)


def test_refuses_a_vector_of_another_shape_type_or_layout(make):
    q, x = sample(4, 10, 4)
    matrix = make(q)
    for bad in (x[0], x[:, :9], x.astype(np.int64), np.asfortranarray(x)):
        with pytest.raises(ValueError, match="uint32"):
            matrix.product(bad)


def test_q_may_be_read_only_or_not_contiguous(make):
    q, x = sample(33, 130, 2)
    wide = np.repeat(q, 2, axis=1)
    wide.setflags(write=False)
    assert (make(wide[:, ::2]).product(x) == exact(q, x)).all()


def test_every_number_of_threads_gives_the_same():
    q, x = sample(700, 600, 9)
    want = exact(q, x)
    matrix = kernels.prepare(q)
    for threads in (0, 1, 2, 3, 64):
        assert (matrix.product(x, threads=threads) == want).all()


def test_concurrent_products_do_not_disturb_each_other():
    cases = [(kernels.prepare(q), x, exact(q, x)) for q, x in (sample(500 + 64 * i, 512, 1 + i) for i in range(4))]
    wrong = []

    def run(matrix, x, want):
        for _ in range(100):
            if not (matrix.product(x) == want).all():
                wrong.append(matrix)

    threads = [threading.Thread(target=run, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not ISAS or sys.platform != "linux", reason="no native core, or no list of threads")
def test_a_limit_of_one_thread_starts_no_other_and_can_be_lifted():
    code = """
import os, numpy as np
from sliplm._core import native
from sliplm.kernels.native import NativeMatrix
def started(threads):
    before = len(os.listdir("/proc/self/task"))
    matrix.product(x, threads=threads)
    return len(os.listdir("/proc/self/task")) - before
every = native.threads()
native.limit_threads(1)
matrix, x = NativeMatrix(np.ones((4096, 512), np.int8)), np.ones((33, 512), np.uint32)
assert native.threads() == 1 and started(0) == started(2) == 0
native.limit_threads(every + 1)
assert native.threads() == every
native.limit_threads(0)
assert native.threads() == every and started(0) == every - 1
"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or not ISAS, reason="no fork, or no native core: install a C++20 compiler")
def test_products_work_in_a_forked_child():
    code = """
import os, numpy as np
from sliplm._core import native
from sliplm.kernels.native import NativeMatrix
q = np.ones((4096, 512), np.int8)
x = np.arange(512, dtype=np.uint32)[None]
matrix = NativeMatrix(q)
assert (matrix.product(x) == x.sum()).all()
pid = os.fork()
if pid == 0:
    right = all((m.product(x, threads=2) == x.sum()).all() for m in (matrix, NativeMatrix(q)))
    tasks = "/proc/self/task"
    alone = os.path.exists(tasks) and native.threads() > 1 and len(os.listdir(tasks)) == 1
    os._exit(0 if right and not alone else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_prepare_refuses_what_cannot_be_exact_or_is_no_matrix():
    with pytest.raises(UnsupportedModelError, match="too wide"):
        kernels.prepare(np.zeros((1, 65536), np.int8))
    for bad in (np.zeros((2, 2), np.int16), np.zeros(4, np.int8), np.zeros((0, 3), np.int8)):
        with pytest.raises(ValueError, match="int8 matrix"):
            kernels.prepare(bad)
    with pytest.raises(ValueError, match="not available"):
        kernels.prepare(np.zeros((1, 1), np.int8), "abacus")


def test_the_best_backend_that_was_built_is_chosen():
    on_the_cpu = [name for name in kernels.available_backends() if name not in ("triton", "cuda")]
    assert on_the_cpu == (["native", "portable"] if ISAS else ["portable"])
    assert kernels.describe().startswith(kernels.available_backends()[0])
    for name in kernels.available_backends():
        q, x = sample(20, 33, 2)
        matrix = kernels.prepare(q, name)
        assert (matrix.rows, matrix.cols) == q.shape and matrix.nbytes >= q.nbytes
        assert (matrix.product(x) == exact(q, x)).all()


class Saturating(PortableMatrix):
    """Wrong the way a kernel typically is: only where sums are large."""

    def product(self, x, *, out=None, threads=0):
        y = super().product(x, out=out, threads=threads)
        big = np.abs(x.astype(np.float64) @ self._q.T.astype(np.float64)) > 2.0**42
        return np.where(big, y ^ 1, y)


def test_a_backend_that_is_wrong_is_passed_over(monkeypatch, caplog):
    monkeypatch.delenv("SLIPLM_BACKEND", raising=False)
    monkeypatch.setattr(
        kernels, "BACKENDS", {"native": f"{__name__}:Saturating", "portable": kernels.BACKENDS["portable"]}
    )
    kernels.self_proof.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kernels.available_backends() == ["portable"]
        assert "self-proof" in caplog.text
        with pytest.raises(ValueError, match="not available"):
            kernels.prepare(np.ones((1, 1), np.int8), "native")
    finally:
        kernels.self_proof.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["forced", "not built"])
def test_without_the_native_core(how):
    code = """
import sys
if sys.argv[1] == "not built":
    sys.modules["sliplm._core._native"] = None
import numpy as np
from sliplm import field, kernels
from sliplm.exchange import masking
assert kernels.available_backends() == ["portable"], kernels.available_backends()
assert field.native is None and masking.native is None
matrix = kernels.prepare(np.full((2, 3), -128, np.int8))
print(matrix.product(np.full((1, 3), field.P - 1, np.uint32)).tolist())
"""
    env = os.environ | {"SLIPLM_BACKEND": "portable" if how == "forced" else "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, how], capture_output=True, text=True, check=True, timeout=120, env=env
    )
    assert done.stdout.strip() == "[[384, 384]]"
    assert ("no native core" in done.stderr) == (how == "not built")
