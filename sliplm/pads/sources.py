"""The trusted side as its own maker of pads, and what an owner may say about who makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sliplm import kernels
from sliplm.bundle import EdgeBundle
from sliplm.errors import BundleError
from sliplm.prg import expand


class SelfSource:
    """The trusted side makes images from Q itself: on one machine, and to try things out. It then holds all of Q.

    Args:
        matrices: Q of every group.
    """

    name = "self"
    parties: frozenset[str] = frozenset()

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

    def image(self, group: int, key: bytes, count: int, threads: int) -> NDArray[np.uint32]:
        """Q r mod p for the first `count` rows r of `key`: (count, M). `threads` = 0 uses every core."""
        matrix = self.matrices[group]
        return matrix.product(expand(key, 0, count, matrix.cols), threads=threads)

    def reject(self) -> None:
        """Raises BundleError: with a wrong image of our own nothing can be computed."""
        raise BundleError("one-time pads that this process made are wrong: its edge bundle or its memory is damaged.")


def read_source(said: str | None, trusted: Path | str) -> Path | int:
    """What an owner `said` about who makes pads: "self:DIR/edge", of which this is the directory; or "helpers" or
    "helpers:2", of which this is how many for each pad. By default the edge bundle beside DIR/trusted.

    Raises BundleError: it is none, or nothing was said and there is none.
    """
    if said is None:
        beside = Path(trusted).resolve().parent / "edge"
        if not beside.is_dir():
            raise BundleError(
                f"nobody makes one-time pads: {beside} is not there; say --pads self:DIR/edge or helpers."
            )
        return beside
    if said in ("helpers", "helpers:1", "helpers:2"):
        return 2 if said.endswith("2") else 1
    kind, _, directory = said.partition(":")
    if kind != "self" or not directory:
        raise BundleError(f"{said!a} does not say who makes one-time pads: self:DIR/edge, helpers or helpers:2 does.")
    return Path(directory)


def find_source(said: str | None, trusted: Path | str, digest: bytes) -> SelfSource | int:
    """`read_source`, the edge bundle opened. Raises BundleError, also if that is of another split than `digest`."""
    source = read_source(said, trusted)
    return SelfSource.open(source, digest) if isinstance(source, Path) else source
