"""The edge in a few lines of Python: what `slip edge` runs, without its API."""

from __future__ import annotations

from pathlib import Path

from sliplm.bundle import EdgeBundle
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.open import CacheLimits, OpenBlocks
from sliplm.edge.worker import EdgeWorker


class Edge(EdgeWorker):
    """An edge bundle and a connection to its trusted side: `run` serves until `stop`, `generate` asks for text.

    Args:
        bundle: DIR/edge; or the bundle itself, whose digest may still be under way (`EdgeBundle.opening`).
        trusted: HOST:PORT of the trusted side, or the pair.
        identity: the file that `slip device add` wrote.
        limits: of what is kept of requests, where blocks are open.

    Raises:
        BundleError, IdentityError, LinkError: one of them is no good.
    """

    def __init__(
        self,
        bundle: Path | str | EdgeBundle,
        trusted: str | tuple[str, int],
        identity: Path | str,
        limits: CacheLimits | None = None,
    ) -> None:
        opening = bundle if isinstance(bundle, EdgeBundle) else EdgeBundle.opening(bundle)
        blocks = None if opening.opened is None else OpenBlocks.load(opening, limits)
        super().__init__(Multiplier.from_bundle(opening), trusted, identity, blocks)
