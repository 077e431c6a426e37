"""Models that are loaded with both halves of a split in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sliplm.kernels import IntMatrix
from sliplm.pads.pool import Pool
from sliplm.pads.sources import SelfSource


def attached(loaded: Any) -> Any:
    """`loaded`, a protected model or an engine with one, that came from DIR/trusted, with DIR/edge as its edge."""
    model = getattr(loaded, "model", loaded) if hasattr(loaded, "chat") else loaded
    model.slip.attach(Path(model.name_or_path).parent / "edge")
    return loaded


def pool_of(matrices: list[IntMatrix], depth: int = 64, batch: int = 16) -> Pool:
    """A pool of pads for `matrices`, which makes their images itself."""
    pool = Pool([(m.rows, m.cols) for m in matrices], depth, batch)
    pool.own = SelfSource(matrices)
    return pool
