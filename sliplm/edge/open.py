"""Open blocks on the edge: hidden states in, hidden states out, and the caches of requests, within limits."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sliplm.bundle import EdgeBundle
from sliplm.errors import BundleError, BusyError, ProtocolError
from sliplm.extras import EXTRAS


class Run(Protocol):
    """Computes a run of open blocks: `sliplm.open.model.Run`."""

    width: int
    row_bytes: int

    def new_cache(self) -> Any: ...

    def length(self, cache: Any) -> int: ...

    def cut(self, cache: Any, length: int) -> bool: ...

    def size(self, cache: Any) -> int: ...

    def compute(self, x: Any, cache: Any) -> Any: ...


@dataclass(frozen=True)
class CacheLimits:
    """How many requests may have caches here, and how many bytes all of these may take. Where that is not enough, those
    go that nobody has asked for in `idle` seconds, the oldest first; if there are none, the new one is refused."""

    count: int = 64
    bytes: int = 4 << 30
    idle: float = 120.0


@dataclass
class _Kept:
    """Of one request: a cache for each run, and when it was last asked for."""

    caches: dict[int, Any] = field(default_factory=dict)
    bytes: int = 0
    used: float = 0.0


class OpenBlocks:
    """The open blocks of a bundle. Safe to call from several threads, which take turns."""

    def __init__(self, runs: Sequence[Run], limits: CacheLimits | None = None) -> None:
        self.widths = [run.width for run in runs]
        self._runs = list(runs)
        self._limits = limits or CacheLimits()
        self._kept: dict[int, _Kept] = {}
        self._turn = threading.Lock()

    @classmethod
    def load(cls, bundle: EdgeBundle, limits: CacheLimits | None = None) -> OpenBlocks:
        """Those of `bundle`, which has some. Raises BundleError: they are damaged, or torch or Transformers is missing
        here."""
        assert bundle.opened is not None
        try:
            model = importlib.import_module("sliplm.open.model")
        except ImportError:
            what, _ = EXTRAS["open"]
            raise BundleError(f"this bundle has open blocks, which take {what}: pip install 'sliplm[open]'.") from None
        return cls(model.load(bundle), limits)

    @property
    def requests(self) -> int:
        """How many have caches here."""
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What all caches take."""
        return sum(kept.bytes for kept in list(self._kept.values()))

    def compute(self, run: int, request: int, start: int, x: Any, keep: bool) -> Any:
        """See `Link.compute`: x (T, H), float32, or bfloat16 as uint16.

        Raises ProtocolError: there is no such run, or `x` does not fit it. BusyError: the cache does not fit, or is not
        here any more.
        """
        if not 0 <= run < len(self._runs) or x.ndim != 2 or x.shape[1] != self.widths[run] or not len(x):
            raise ProtocolError(f"this bundle has no open run {run} for rows of {x.shape[-1]} numbers")
        blocks = self._runs[run]
        with self._turn:
            kept = self._kept.get(request)
            if kept is None and not keep and not start:
                return self._computed(blocks, request, x, None)
            if kept is None:
                kept = self._kept[request] = self._admit(start)
            kept.used = time.monotonic()
            cache = kept.caches.get(run)
            if cache is None:
                cache = kept.caches[run] = blocks.new_cache()
            there = blocks.length(cache)
            if start > there or (start < there and not blocks.cut(cache, start)):
                raise self._lost(request)
            self._make_room(kept, len(x) * blocks.row_bytes)
            y = self._computed(blocks, request, x, cache)
            kept.bytes = sum(self._runs[number].size(cache) for number, cache in kept.caches.items())
            if not keep:
                del kept.caches[run]
                if not kept.caches:
                    self.forget(request)
            return y

    def forget(self, request: int) -> None:
        """Free the caches of a request, if they are here. Never waits: it may be called while this thread computes."""
        self._kept.pop(request, None)

    def clear(self) -> None:
        """Free all caches."""
        self._kept.clear()

    def _computed(self, blocks: Run, request: int, x: Any, cache: Any) -> Any:
        try:
            return blocks.compute(x, cache)
        except MemoryError:
            self.forget(request)
            raise BusyError("the edge ran out of memory over the open blocks of this request.") from None
        except BaseException:
            self.forget(request)
            raise

    def _admit(self, start: int) -> _Kept:
        if start:
            raise self._lost(None)
        while len(self._kept) >= self._limits.count:
            if not self._free_oldest(None):
                raise BusyError(f"the edge has the caches of {len(self._kept)} requests, and no room for another.")
        return _Kept()

    def _make_room(self, kept: _Kept, more: int) -> None:
        while (taken := self.bytes) + more > self._limits.bytes:
            if not self._free_oldest(kept):
                raise BusyError(
                    f"the cache of this request does not fit: the edge's take {taken >> 20} MB of "
                    f"{self._limits.bytes >> 20} MB."
                )

    def _free_oldest(self, but: _Kept | None) -> bool:
        """Free the caches of the request that has been idle the longest, but of `but`; whether there was one."""
        last = time.monotonic() - self._limits.idle
        there = list(self._kept.items())  # others forget meanwhile
        idle = [(kept.used, request) for request, kept in there if kept.used < last and kept is not but]
        if idle:
            self.forget(min(idle)[1])
        return bool(idle)

    def _lost(self, request: int | None) -> BusyError:
        if request is not None:
            self.forget(request)
        return BusyError("the edge does not have the cache of this request any more: try again.")
