"""What a backend provides."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

MAX_COLUMNS = 65535
"""255 * 128 * 65535 < 2^31: up to here the sum of one digit's products fits an int32."""


class IntMatrix(ABC):
    """An integer matrix Q (rows, cols), ready for exact products modulo p."""

    rows: int
    cols: int
    nbytes: int

    @abstractmethod
    def __init__(self, q: NDArray[np.int8]) -> None: ...

    @abstractmethod
    def product(
        self, x: NDArray[np.uint32], *, out: NDArray[np.uint32] | None = None, threads: int = 0
    ) -> NDArray[np.uint32]:
        """Q x_t mod p for every row of `x` (T, cols), C-contiguous and canonical: (T, rows), canonical.

        Written to `out` if given. `threads` = 0 uses every core. Raises ValueError for wrong shapes or types.
        """

    @staticmethod
    @abstractmethod
    def available() -> bool:
        """Whether this backend can run in this process at all."""

    @staticmethod
    @abstractmethod
    def describe() -> str:
        """The backend and how it runs, for people."""

    def _check(self, x: NDArray[np.uint32], out: NDArray[np.uint32] | None) -> NDArray[np.uint32]:
        """Check the arguments of `product`; return the array to fill."""
        if x.ndim != 2 or x.shape[1] != self.cols or x.dtype != np.uint32 or not x.flags.c_contiguous:
            raise ValueError(f"expected C-contiguous uint32 (T, {self.cols}), not {x.dtype} {x.shape}")
        if out is None:
            return np.empty((x.shape[0], self.rows), np.uint32)
        if out.shape != (x.shape[0], self.rows) or out.dtype != np.uint32 or not out.flags.carray:
            raise ValueError(f"expected a writable C-contiguous uint32 out of shape {(x.shape[0], self.rows)}")
        return out
