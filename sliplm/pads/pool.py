"""One-time pads, made ahead in batches.

A pad for (group, token) is r, uniform in F_p^K, and its image Q r. That no pad is used twice holds by construction:

* the r of every batch come from a stream of their own, whose key is drawn for it and forgotten when they are made;
* `take` moves pads out of the pool under a lock, so no two callers can receive the same one;
* a `Pad` gives its r once: the second reading raises. Whoever retries after a failure takes a new pad;
* after fork the child's pool and stream refuse to work.

What this cannot rule out is a machine whose whole memory is copied and resumed twice: both copies then use the pads
that lay in the pool, and none that were made later (docs/security.md).
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sliplm.errors import LinkError
from sliplm.pads.prg import Stream
from sliplm.pads.sources import Source

Array = NDArray[np.uint32]


class Pad:
    """Pads for T tokens of one group. `mask()` gives r (T, K), once; `image` is Q r (T, M)."""

    __slots__ = ("_mask", "image")

    def __init__(self, mask: Array, image: Array) -> None:
        self._mask: Array | None = mask
        self.image = image

    def __repr__(self) -> str:
        return "Pad(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("a pad cannot be copied")

    def mask(self) -> Array:
        """r, uint32 (T, K). Raises RuntimeError on the second call."""
        mask, self._mask = self._mask, None
        if mask is None:
            raise RuntimeError("this pad has been used")
        return mask


class Pool:
    """Pads of every group, refilled by one background thread while somebody wants it.

    Args:
        shapes: (M, K) of every group's Q.
        depth: tokens per group to keep ready; 0 makes every pad when it is taken.
        batch: tokens made at a time.

    Attributes:
        source: who makes the images; None is nobody, and there are no pads then.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], depth: int = 64, batch: int = 16) -> None:
        self.source: Source | None = None
        self._widths = [columns for _, columns in shapes]
        self._ready: list[deque[tuple[Array, Array]]] = [deque() for _ in shapes]
        self._levels = [0] * len(self._ready)
        self._depth = depth
        self._batch = batch
        self._lock = threading.Lock()
        self._state = threading.Condition(self._lock)
        self._waiting: list[int] = []  # levels that callers of `wait` wait for
        self._pid = os.getpid()
        self._filler: threading.Thread | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Pool(groups={len(self._levels)}, level={self.level})"

    @property
    def level(self) -> int:
        """Tokens for which every group has a pad ready."""
        return min(self._levels, default=0)

    @property
    def mean_level(self) -> float:
        """The same, averaged over groups."""
        return sum(self._levels) / max(1, len(self._levels))

    @property
    def depth(self) -> int:
        """The level that the filler aims at."""
        return self._depth

    def resize(self, depth: int) -> None:
        """Keep `depth` pads per group ready from now on."""
        with self._state:
            self._depth = depth
            self._state.notify_all()

    def start(self) -> None:
        """Begin filling in the background. Does nothing when depth is 0, or a filler runs, or nobody makes pads."""
        with self._state:
            if self._depth and self.source is not None and self._filler is None and not self._closed:
                # A thread inside the kernels while the interpreter takes them down would abort the process.
                atexit.register(self.close)
                self._filler = threading.Thread(target=self._fill, name="pads", daemon=True)
                self._filler.start()

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._filler is not None:
            self._filler.join()
        self._ready = [deque() for _ in self._levels]

    def wait(self, tokens: int, timeout: float | None = None) -> bool:
        """Wait until `tokens` (at most the depth) pads are ready in every group; false after `timeout` seconds."""
        with self._state:
            self._waiting.append(tokens)
            self._state.notify_all()
            try:
                return self._state.wait_for(lambda: self.level >= min(tokens, self._depth) or self._closed, timeout)
            finally:
                self._waiting.remove(tokens)

    def take(self, group: int, tokens: int) -> Pad:
        """Pads for `tokens` tokens of `group`; those that are not ready are made now.

        Raises LinkError if nobody makes any.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a pool of pads does not survive fork")
        if self._closed:
            raise RuntimeError("the pool of pads is closed")
        parts: list[tuple[Array, Array]] = []
        missing = tokens
        with self._lock:
            ready = self._ready[group]
            while missing and ready:
                mask, image = ready.popleft()
                if len(mask) > missing:
                    ready.appendleft((mask[missing:], image[missing:]))
                    mask, image = mask[:missing], image[:missing]
                parts.append((mask, image))
                missing -= len(mask)
            self._levels[group] -= tokens - missing
            if self._levels[group] <= max(0, self._depth - self._batch):  # wake the filler for whole batches only
                self._state.notify_all()
        if missing:
            parts.append(self._make(group, missing))
        if len(parts) == 1:
            return Pad(*parts[0])
        return Pad(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))

    def _make(self, group: int, tokens: int, threads: int = 0) -> tuple[Array, Array]:
        if self.source is None:
            raise LinkError("nobody makes one-time pads: say where they come from (--pads self:DIR/edge).")
        mask = Stream().elements(tokens, self._widths[group])
        return mask, self.source.image(group, mask, threads)

    def _lacking(self) -> bool:
        """Whether it is time for another batch: small ones cost more a token."""
        level = self.level
        wanted = min(max(self._waiting, default=1), self._depth)
        return level < wanted or level + self._batch <= self._depth

    def _fill(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._lacking())
                if self._closed:
                    return
                group = min(range(len(self._levels)), key=self._levels.__getitem__)
                count = min(self._batch, self._depth - self._levels[group])
            made = self._make(group, count, threads=1)
            with self._state:
                self._ready[group].append(made)
                self._levels[group] += count
                self._state.notify_all()
