"""The native backend: digit products on packed int8 weights, in C++ (`sliplm/_core`)."""

import numpy as np
from numpy.typing import NDArray

from sliplm._core import native
from sliplm.kernels.base import IntMatrix


class NativeMatrix(IntMatrix):
    """Q repacked in aligned memory, for the best instruction set or for `isa`, one of `native.isas()`."""

    def __init__(self, q: NDArray[np.int8], isa: str = "") -> None:
        assert native is not None
        self._packed = native.PackedMatrix(np.ascontiguousarray(q), isa)
        self.rows, self.cols = q.shape
        self.nbytes = self._packed.nbytes

    def product(
        self, x: NDArray[np.uint32], *, out: NDArray[np.uint32] | None = None, threads: int = 0
    ) -> NDArray[np.uint32]:
        if out is None:
            out = np.empty((len(x), self.rows), np.uint32)
        try:
            self._packed.product(x, out, threads)
        except (TypeError, ValueError):  # the core looks at shapes and types itself; this says more
            self._check(x, out)
            raise
        return out

    @staticmethod
    def available() -> bool:
        return native is not None

    @staticmethod
    def describe() -> str:
        assert native is not None
        return f"native ({native.isas()[0]}, {native.threads()} threads)"
