"""Who makes the pads' images Q r: today the trusted side itself, from an edge bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sliplm import kernels
from sliplm.bundle import EdgeBundle
from sliplm.errors import BundleError


class Source(Protocol):
    """Makes images of pads."""

    def image(self, group: int, r: NDArray[np.uint32], threads: int) -> NDArray[np.uint32]:
        """Q r mod p for every row of r (T, K): (T, M). `threads` = 0 uses every core."""


class SelfSource:
    """The trusted side makes images from Q itself: on one machine, and to try things out. It then holds all of Q.

    Args:
        matrices: Q of every group.
    """

    def __init__(self, matrices: Sequence[kernels.IntMatrix]) -> None:
        self.matrices = list(matrices)

    @classmethod
    def open(cls, directory: Path | str, digest: bytes) -> SelfSource:
        """From DIR/edge, the counterpart of the trusted bundle that names the split `digest`. Raises BundleError."""
        edge = EdgeBundle.open(directory)
        if edge.digest != digest:
            raise BundleError(f"{directory} and the trusted bundle come from two different splits.")
        matrices = []
        for group in range(len(edge.shapes)):
            matrices.append(kernels.prepare(edge.matrix(group)))
            edge.forget(group)
        return cls(matrices)

    def image(self, group: int, r: NDArray[np.uint32], threads: int = 0) -> NDArray[np.uint32]:
        """See Source."""
        return self.matrices[group].product(r, threads=threads)


def find_source(said: str | None, trusted: Path | str, digest: bytes) -> SelfSource:
    """What an owner `said` about who makes pads, "self:DIR/edge"; by default the edge bundle beside DIR/trusted.

    Raises BundleError: it is none, or of another split than `digest`; or nothing was said and there is none.
    """
    if said is None:
        beside = Path(trusted).resolve().parent / "edge"
        if not beside.is_dir():
            raise BundleError(f"nobody makes one-time pads: {beside} is not there; say --pads self:DIR/edge.")
        return SelfSource.open(beside, digest)
    kind, _, directory = said.partition(":")
    if kind != "self" or not directory:
        raise BundleError(f"{said!a} does not say who makes one-time pads: self:DIR/edge does.")
    return SelfSource.open(directory, digest)
