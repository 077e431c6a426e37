"""The edge's whole computation: integer matrices times vectors that look like noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sliplm import kernels
from sliplm.errors import ProtocolError
from sliplm.field import P

if TYPE_CHECKING:
    from sliplm.bundle import EdgeBundle

Field = NDArray[np.uint32]

FEW_ROWS = 4
GAIN = 1.25
"""All cores are worth it for few rows if they are so many times as fast as one."""
TRIES = 5


class Multiplier:
    """Exact products with the matrices of one bundle. Thread-safe as far as its matrices are.

    Attributes:
        digest: the 32 bytes that name the split, the same on the trusted side.
        shapes: (M, K) of every group.
    """

    def __init__(self, matrices: Sequence[kernels.IntMatrix], digest: bytes) -> None:
        self.digest = digest
        self.shapes = [(m.rows, m.cols) for m in matrices]
        self._matrices = list(matrices)
        self._few = 0  # threads for few rows; 0: all

    @classmethod
    def from_bundle(cls, bundle: EdgeBundle) -> Multiplier:
        """Prepare every matrix of `bundle` for this machine's kernels. Raises BundleError if its digest is wrong."""
        matrices = []
        for group in range(len(bundle.shapes)):
            matrices.append(kernels.prepare(bundle.matrix(group)))
            bundle.forget(group)
        bundle.check()
        engine = cls(matrices, bundle.digest)
        if matrices:  # a plan may mask nothing
            engine._few = _useful_threads(max(matrices, key=lambda m: m.nbytes))
        return engine

    def product(self, group: int, x: Field, out: Field | None = None) -> Field:
        """Q x mod p for every row of `x`: (T, K) uint32 to (T, M), written to `out` if given.

        Raises ProtocolError if there is no such group, or if `x` has the wrong shape or holds numbers that
        are not field elements: an exact answer is then impossible.
        """
        if not 0 <= group < len(self.shapes):
            raise ProtocolError(f"this bundle has {len(self.shapes)} groups, and no group {group}")
        k = self.shapes[group][1]
        if x.ndim != 2 or x.shape[1] != k:
            raise ProtocolError(f"group {group} takes rows of {k} numbers")
        x = np.ascontiguousarray(x)
        if np.maximum.reduce(x, axis=None, initial=0) >= P:
            raise ProtocolError("the rows hold numbers outside the field")
        return self._matrices[group].product(x, out=out, threads=self._few if len(x) <= FEW_ROWS else 0)


def _useful_threads(matrix: kernels.IntMatrix) -> int:
    """How many threads a product with one row is worth: 1, or 0 for all.

    It is bound by reading the matrix. Where one core reads nearly as fast as all of them, the others are better left
    to whoever shares the machine, as a trusted side on the same host does."""
    x = np.ones((1, matrix.cols), np.uint32)
    out = np.empty((1, matrix.rows), np.uint32)

    def fastest(threads: int) -> float:
        times = []
        for _ in range(TRIES):
            start = time.perf_counter()
            matrix.product(x, out=out, threads=threads)
            times.append(time.perf_counter() - start)
        return min(times)

    return 1 if fastest(1) < GAIN * fastest(0) else 0
