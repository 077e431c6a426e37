"""The GPU's arithmetic against Python integers, on whatever there is.

Without a GPU `torch._int_mm` runs on the CPU, and the Triton kernels in Triton's interpreter, for which this file runs
itself again: the interpreter has to be chosen before Triton is imported. They are also compiled, for GPUs that are not
here. With a GPU both run on it.
"""

import importlib.util
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm import kernels
from sliplm.errors import SlipError
from sliplm.field import HALF, P
from sliplm.kernels.cuda import CudaMatrix, TritonMatrix

pytestmark = pytest.mark.slow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def makers():
    if INTERPRETED:
        return {"triton, interpreted": lambda q: TritonMatrix(q, "cpu")}
    found = {"int_mm on the CPU": lambda q: CudaMatrix(q, "cpu")}
    if CudaMatrix.available():
        found["int_mm"] = CudaMatrix
    if TritonMatrix.available():
        found["triton"] = TritonMatrix
    return found


MAKERS = makers()
once_only = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with the interpreter")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install -r requirements-dev.txt")


@pytest.fixture(params=MAKERS)
def make(request):
    if request.param == "int_mm on the CPU":
        most = torch.full((32, 64), -128, dtype=torch.int8)
        if not (torch._int_mm(most, most.T) == 64 * 128 * 128).all():
            pytest.skip("this CPU's torch._int_mm saturates")
    return MAKERS[request.param]


def exact(q, x):
    return x.astype(object) @ q.T.astype(object) % P


def sample(rows, cols, tokens):
    """Any 32-bit values, not only field elements."""
    rng = np.random.default_rng([rows, cols, tokens])
    return (
        rng.integers(-128, 128, (rows, cols)).astype(np.int8),
        rng.integers(0, 2**32, (tokens, cols)).astype(np.uint32),
    )


@once_only
@needs_triton
def test_this_file_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tokens", [1, 4, 5, 17, 33])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 128), (129, 257)])
def test_every_kernel_on_whole_tiles_and_on_parts(make, rows, cols, tokens):
    q, x = sample(rows, cols, tokens)
    product = make(q).product(x)
    assert product.dtype == np.uint32 and product.shape == (tokens, rows)
    assert (product == exact(q, x)).all()


EXTREMES = [
    -2 * pow(127 * 65535, -1, P) % P,  # with a row of 127, nearly the lowest sum there is, and p - 2 modulo p
    -0x00808080 % P,  # three digits are -128
    0x3F7F7F7F,  # four are as large as can be
    *(P - 1, P, 0, 1, HALF, HALF + 1, 0x00FFFFFF, 0x7F7F7F7F, 2**31, 2**32 - 1),
]


@pytest.mark.parametrize(("cols", "tokens"), [(65535, 3), (515, len(EXTREMES)), (515, 2 * len(EXTREMES))])
def test_extreme_values(make, cols, tokens):
    """Where an accumulator would overflow or saturate, if any could: the largest digits and weights all along."""
    q = np.empty((8, cols), np.int8)
    q[:] = np.array([-128, 127, -127, 0, 1, -1, -128, 127])[:, None]
    q[6, ::2], q[7, 1::2] = 127, -128
    values = np.resize(np.array(EXTREMES, object), tokens)
    x = np.tile(values.astype(np.uint32)[:, None], cols)
    assert (make(q).product(x) == values[:, None] * q.sum(axis=1, dtype=np.int64).astype(object) % P).all()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_matrix(data):
    rows, cols, tokens = (data.draw(st.integers(1, most)) for most in (140, 200, 36))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q = data.draw(st.sampled_from([rng.integers(-128, 128, (rows, cols)), rng.choice([-128, 127], (rows, cols))]))
    special = [0, 1, HALF, HALF + 1, P - 1, P, 0x00FFFFFF, 0x80808080, 2**32 - 1]
    x = data.draw(st.sampled_from([rng.integers(0, 2**32, (tokens, cols)), rng.choice(special, (tokens, cols))]))
    q, x = q.astype(np.int8), x.astype(np.uint32)
    for maker in MAKERS.values():
        assert (maker(q).product(x) == exact(q, x)).all()


def test_many_tokens_go_in_passes_of_bounded_size(make, monkeypatch):
    monkeypatch.setattr("sliplm.kernels.cuda._PASS", 128 * 10)
    q, x = sample(20, 128, 23)
    matrix, sizes = make(q), []
    multiply = matrix._multiply
    monkeypatch.setattr(matrix, "_multiply", lambda x: sizes.append(len(x)) or multiply(x))
    assert (matrix.product(x) == exact(q, x)).all()
    assert sizes == [10, 10, 3]
    assert matrix.product(x[:0]).shape == (0, 20)


def test_q_may_be_read_only_or_not_contiguous_and_takes_what_it_says(make):
    q, x = sample(33, 130, 2)
    wide = np.repeat(q, 2, axis=1)
    wide.setflags(write=False)
    matrix = make(wide[:, ::2])
    assert (matrix.product(x) == exact(q, x)).all()
    assert matrix.nbytes == matrix._q.nbytes == 128 * 256


def test_writes_into_out_and_refuses_what_does_not_fit(make):
    q, x = sample(40, 65, 3)
    matrix = make(q)
    out = np.full((3, 40), 7, np.uint32)
    assert matrix.product(x, out=out) is out and (out == exact(q, x)).all()
    for bad in (x[0], x[:, :9], x.astype(np.int64), np.asfortranarray(x)):
        with pytest.raises(ValueError, match="uint32"):
            matrix.product(bad)


@once_only
def test_concurrent_products_do_not_disturb_each_other(make):
    cases = [(make(q), x, exact(q, x)) for q, x in (sample(50 + 64 * i, 130, 1 + 7 * i) for i in range(4))]
    right = []

    def run(matrix, x, want):
        right.append(all((matrix.product(x) == want).all() for _ in range(50)))

    threads = [threading.Thread(target=run, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


@once_only
def test_a_gpu_that_is_too_small_or_fails_is_named_in_a_sentence(monkeypatch):
    matrix = CudaMatrix(np.ones((2, 2), np.int8), "cpu")

    def fails_with(error):
        def fail(*_):
            raise error

        return fail

    x = np.zeros((1, 2), np.uint32)
    monkeypatch.setattr(matrix, "_multiply", fails_with(torch.OutOfMemoryError("CUDA out of memory.\nTried to ...")))
    with pytest.raises(MemoryError, match="GPU"):
        matrix.product(x)
    monkeypatch.setattr(
        matrix, "_multiply", fails_with(RuntimeError("CUDA error: unspecified launch failure\nCUDA ..."))
    )
    with pytest.raises(SlipError, match=r"^the GPU failed: CUDA error: unspecified launch failure$"):
        matrix.product(x)

    full = types.SimpleNamespace(to=fails_with(torch.OutOfMemoryError("CUDA out of memory.")))
    monkeypatch.setattr(torch, "from_numpy", lambda _: full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 20, 24000 << 20))
    with pytest.raises(SlipError, match=r"do not fit .* 5 of 24000 MiB are free, and the next matrix takes 1\."):
        CudaMatrix(np.ones((1000, 1000), np.int8))


@once_only
def test_without_a_gpu_the_backends_are_passed_over():
    code = "from sliplm import kernels; print(kernels.available_backends(), kernels.describe())"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SLIPLM_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "triton" not in done.stdout and "cuda" not in done.stdout
    assert done.stderr == ""  # a machine without a GPU is nothing to warn of


@pytest.mark.parametrize("spoiled", ["_reduce", "_digits"])
@pytest.mark.skipif(not INTERPRETED, reason="takes the interpreter")
def test_the_self_proof_finds_a_wrong_kernel(monkeypatch, spoiled):
    """A wrong constant deep inside, as a compiler might put it there."""
    from sliplm.kernels import triton_kernel

    proof = kernels.self_proof.__wrapped__
    here = type("Here", (TritonMatrix,), {"__init__": lambda self, q: super(here, self).__init__(q, "cpu")})
    here.available = staticmethod(lambda: True)
    monkeypatch.setattr(kernels, "_kind", lambda _: here)
    monkeypatch.setattr(kernels, "_PROOF", [case for case in kernels._PROOF if case[1] < 500 and case[2] < 50])
    assert proof("triton")
    original = getattr(triton_kernel, spoiled)
    monkeypatch.setattr(triton_kernel, spoiled, lambda v: original(v) ^ 1)
    assert not proof("triton")


@once_only
@needs_triton
@pytest.mark.parametrize(("capability", "dot"), [(80, "mma.sync"), (90, "wgmma"), (100, "mma.sync"), (120, "mma.sync")])
def test_compiles_to_few_programs_on_tensor_cores_within_a_gpus_memory(capability, dot, monkeypatch, tmp_path):
    """What the interpreter does not see; needs no GPU, since Triton brings NVIDIA's assembler."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from sliplm.kernels.triton_kernel import product

    pretended = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda _: 0,
    )
    built, run = {}, JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        program = run(self, *args, warmup=True, **kwargs)
        built[program.hash] = program

    monkeypatch.setattr(driver, "_active", pretended)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for rows, cols, tokens in [
        (128, 128, 1),
        (256, 384, 2),
        (128, 128, 5),
        (256, 384, 16),
        (128, 128, 17),
        (256, 384, 512),
    ]:
        product(torch.zeros(rows, cols, dtype=torch.int8), torch.zeros(tokens, cols, dtype=torch.int32))
    programs = sorted(built.values(), key=lambda program: program.metadata.shared)
    assert [program.metadata.name for program in programs] == ["_split"] + 3 * ["_product"]  # the self-proof runs all
    for program, instruction in zip(programs[1:], ("mma.sync", dot, dot), strict=True):  # wgmma takes 64 rows
        assert any(instruction in line and ".s32.s8.s8" in line for line in program.asm["ptx"].splitlines())
    # What one block may have by NVIDIA's tables: 227 KiB on 9.0 and 10.0, 163 on 8.0, and 99 on 8.6, 8.9 and 12.0.
    assert programs[-1].metadata.shared <= (227 if capability in (90, 100) else 99) << 10
