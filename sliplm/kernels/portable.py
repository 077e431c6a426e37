"""The portable backend: one float64 matrix product, exact anywhere.

With x centred, every partial sum is an integer below 2^30 * 2^7 * 2^16 = 2^53, in any order of summation,
and float64 holds it exactly. Float32 would need digits, four products and twice the time.
"""

import numpy as np
from numpy.typing import NDArray

from sliplm.field import P, centre
from sliplm.kernels.base import IntMatrix

_BLOCK = 1 << 19  # weights widened to float64 at a time: 4 MiB, so that the copy stays in a cache


class PortableMatrix(IntMatrix):
    """Q as it came, int8; widened block by block during a product."""

    def __init__(self, q: NDArray[np.int8]) -> None:
        self.rows, self.cols = q.shape
        self.nbytes = q.nbytes
        self._q = q if q.flags.carray else q.copy()  # what is read-only may be a file, which could change

    def product(
        self, x: NDArray[np.uint32], *, out: NDArray[np.uint32] | None = None, threads: int = 0
    ) -> NDArray[np.uint32]:
        out = self._check(x, out)  # `threads` is BLAS's to decide
        wide = centre(x).astype(np.float64)
        step = max(1, _BLOCK // self.cols)
        for start in range(0, self.rows, step):
            block = self._q[start : start + step].astype(np.float64)
            out[:, start : start + step] = (wide @ block.T).astype(np.int64) % P
        return out

    @staticmethod
    def available() -> bool:
        return True

    @staticmethod
    def describe() -> str:
        return "portable (float64)"
