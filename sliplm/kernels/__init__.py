"""Exact products Q x mod p on the wire format, whatever the machine offers: one function, several backends.

A backend is used only after it has proved itself, in this process, against exact integers; one that fails is
passed over for the next. SLIPLM_BACKEND=triton|cuda|native|portable forces one. Each is imported when it is first
asked for: those for CUDA need torch, which an edge can do without.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sliplm.errors import UnsupportedModelError
from sliplm.field import P
from sliplm.kernels.base import MAX_COLUMNS, IntMatrix

__all__ = ["MAX_COLUMNS", "IntMatrix", "available_backends", "describe", "prepare", "self_proof"]

BACKENDS = {  # the fastest first, and where each is
    "triton": "sliplm.kernels.cuda:TritonMatrix",
    "cuda": "sliplm.kernels.cuda:CudaMatrix",
    "native": "sliplm.kernels.native:NativeMatrix",
    "portable": "sliplm.kernels.portable:PortableMatrix",
}
# (rows, columns, tokens): every kernel of every backend, on whole tiles and on parts of them, and the widest sum
_PROOF = [(1, 1, 1), (17, 65, 2), (33, 515, 5), (100, 1030, 1), (64, 4099, 7), (3, MAX_COLUMNS, 2)]
_PROOF += [(256, 384, 33), (130, 260, 300)]

_log = logging.getLogger(__name__)


def prepare(q: NDArray[np.int8], backend: str | None = None) -> IntMatrix:
    """Make `q` (M, K) int8 ready for exact products, with the best backend that works here, or the named one.

    Raises UnsupportedModelError if K is 65536 or more (sums would not fit 32 bits); ValueError for a backend
    that is unknown or not available, or a `q` that is not a non-empty int8 matrix.
    """
    if q.ndim != 2 or q.dtype != np.int8 or not q.size:
        raise ValueError(f"expected a non-empty int8 matrix, not {q.dtype} of shape {q.shape}")
    if q.shape[1] > MAX_COLUMNS:
        raise UnsupportedModelError(
            f"a layer with {q.shape[1]} inputs is too wide: exact products need at most {MAX_COLUMNS}"
        )
    return _named(backend or _choose())(q)


def available_backends() -> list[str]:
    """The backends that can run and have proved themselves here, best first."""
    return list(_usable())


def describe() -> str:
    """The backend in use and how it runs, for logs and reports: "native (AVX-512 VNNI, 2 threads)"."""
    return _kind(_choose()).describe()


@cache
def self_proof(backend: str) -> bool:
    """Whether `backend` runs here and is exact on random and extreme values; asked once per process."""
    try:
        kind = _kind(backend)
        if not kind.available():
            return False
        for rows, cols, tokens in _PROOF:
            # Not numpy.random, which takes longer to import than all of this to run.
            q = np.frombuffer(bytearray(os.urandom(rows * cols)), np.int8).reshape(rows, cols)
            x = np.frombuffer(bytearray(os.urandom(4 * tokens * cols)), np.uint32).reshape(tokens, cols) % np.uint32(P)
            q[0], q[-1], q[rows // 2, ::2] = -128, 127, -127
            x[0, ::3], x[-1, 1::3] = P - 1, 0
            x[tokens // 2, 2::3] = 0x00FFFFFF
            exact = x.astype(np.int64) @ q.T.astype(np.int64) % P  # sums below 2^31 * 2^7 * 2^16
            if not (kind(q).product(x) == exact).all():
                raise ArithmeticError("a product is wrong")
    except Exception as reason:
        if isinstance(reason, ModuleNotFoundError) and reason.name == "torch":
            return False  # nothing to warn of: an edge without a GPU does not need it
        _log.warning("the %s kernels failed their self-proof and are not used: %s", backend, reason)
        return False
    return True


def _usable() -> Iterator[str]:
    forced = os.environ.get("SLIPLM_BACKEND")
    return (name for name in BACKENDS if forced in (None, "", name) and self_proof(name))


def _choose() -> str:
    for name in _usable():  # the first proof that holds is enough
        return name
    raise ValueError(f"no usable kernel backend (SLIPLM_BACKEND={os.environ.get('SLIPLM_BACKEND', '')})")


def _named(backend: str) -> type[IntMatrix]:
    if backend not in BACKENDS or not self_proof(backend):
        raise ValueError(f"the kernel backend {backend!r} is not available")
    return _kind(backend)


def _kind(backend: str) -> type[IntMatrix]:
    """Raises ModuleNotFoundError if the backend needs a package that is not installed."""
    module, _, name = BACKENDS[backend].partition(":")
    kind: type[IntMatrix] = getattr(importlib.import_module(module), name)
    return kind
