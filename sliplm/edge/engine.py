"""The edge's whole computation: integer matrices times vectors that look like noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sliplm import field, kernels
from sliplm.errors import ProtocolError

if TYPE_CHECKING:
    from sliplm.bundle import EdgeBundle

Field = NDArray[np.uint32]


class EdgeEngine:
    """Exact products with the matrices of one bundle. Thread-safe as far as its matrices are.

    Attributes:
        digest: the 32 bytes that name the split, the same on the trusted side.
        shapes: (M, K) of every group.
    """

    def __init__(self, matrices: Sequence[kernels.IntMatrix], digest: bytes) -> None:
        self.digest = digest
        self.shapes = [(m.rows, m.cols) for m in matrices]
        self._matrices = list(matrices)

    @classmethod
    def from_bundle(cls, bundle: EdgeBundle) -> EdgeEngine:
        """Prepare every matrix of `bundle` for this machine's kernels."""
        return cls([kernels.prepare(bundle.matrix(g)) for g in range(len(bundle.shapes))], bundle.digest)

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
        if not field.is_canonical(x):
            raise ProtocolError("the rows hold numbers outside the field")
        return self._matrices[group].product(x, out=out)
