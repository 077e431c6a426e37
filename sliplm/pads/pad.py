"""A one-time pad, and the batch that it was cut from.

A pad for (group, token) is r, uniform in F_p^K, and its image Q r. A batch of them is a key, from which r is expanded
(`sliplm.prg`), and the images that a maker returned for it. Rows leave a batch once, see `sliplm.pads.pool`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sliplm import field
from sliplm.prg import Rows

Array = NDArray[np.uint32]

AHEAD = 16
"""Rows that are expanded at a time: one by one, the calls would take longer than the cipher."""


class Maker(Protocol):
    """Who makes images. `parties` may know r: those of the helpers that made them; of nobody, for the trusted side.
    `name` is the same for all that is one machine's."""

    @property
    def name(self) -> str: ...
    @property
    def parties(self) -> frozenset[str]: ...

    def reject(self) -> None:
        """One of its images was wrong: no pad of its is used any more."""
        ...


class Images(Protocol):
    """The images of a batch (count, M), wherever they are."""

    def load(self) -> Array:
        """Raises OSError if they are not what they were."""
        ...


class Batch:
    """`count` pads of one group: r of width K is the sum of what its keys expand to, from the row `begin` on. `names`
    are those of the machines that made them, if they are others than the maker's."""

    def __init__(
        self,
        maker: Maker,
        keys: Sequence[bytes],
        count: int,
        width: int,
        images: Array | Images,
        begin: int = 0,
        names: Iterable[str] = (),
    ) -> None:
        self.maker = maker
        self.stored = not isinstance(images, np.ndarray)  # somewhere else than in memory
        self.names = frozenset(names) or frozenset({maker.name})
        self.count = count
        self._keys, self._width, self._images, self._begin = tuple(keys), width, images, begin
        self._lock = threading.Lock()
        self._ahead: Array = np.empty((0, width), np.uint32)
        self._first = 0  # of the rows in `_ahead`
        self._rows: list[Rows] = []  # of every key, those after `_ahead`

    def __repr__(self) -> str:
        return f"Batch({self.count}, <secret>)"

    def __reduce__(self) -> str:
        raise TypeError("a batch of pads cannot be copied")

    def mask(self, first: int, count: int) -> Array:
        """r of some rows, (count, K)."""
        with self._lock:
            start = first - self._first
            if start < 0 or start + count > len(self._ahead):
                if not self._rows or self._rows[0].next != self._begin + first:
                    self._rows = [Rows(key, self._begin + first, self._width) for key in self._keys]
                rows, self._rows = self._rows, []  # one that raises may be anywhere
                parts = [of_key.take(min(max(count, AHEAD), self.count - first)) for of_key in rows]
                self._rows = rows
                self._ahead, self._first, start = parts[0], first, 0
                for part in parts[1:]:
                    self._ahead = field.add(self._ahead, part)
            return self._ahead[start : start + count]

    def load(self) -> None:
        """Have the images in memory from now on. Raises OSError if they are not what they were."""
        with self._lock:
            if not isinstance(self._images, np.ndarray):
                self._images = self._images.load()
                self.stored = False

    def image(self, first: int, count: int) -> Array:
        """Q r of some rows, (count, M), as the maker said."""
        if not isinstance(self._images, np.ndarray):
            raise RuntimeError("these images have not been loaded")
        return self._images[first : first + count]


class Part:
    """`count` rows of a batch, from the row `first` on."""

    __slots__ = ("batch", "count", "first")

    def __init__(self, batch: Batch, first: int, count: int) -> None:
        self.batch, self.first, self.count = batch, first, count

    def __reduce__(self) -> str:
        raise TypeError("a part of a batch of pads cannot be copied")


class Pad:
    """Pads for T tokens of one group. `mask()` gives r (T, K), once; `image` is Q r (T, M)."""

    __slots__ = ("_parts", "_used")

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._used = False

    def __repr__(self) -> str:
        return "Pad(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("a pad cannot be copied")

    def mask(self) -> Array:
        """r, uint32 (T, K). Raises RuntimeError on the second call."""
        if self._used:
            raise RuntimeError("this pad has been used")
        self._used = True
        first, *rest = self._parts
        mask = first.batch.mask(first.first, first.count)
        return np.concatenate([mask, *(p.batch.mask(p.first, p.count) for p in rest)]) if rest else mask

    @property
    def image(self) -> Array:
        """uint32 (T, M), as the makers said; whether it is right, the exchange shows."""
        first, *rest = self._parts
        image = first.batch.image(first.first, first.count)
        return np.concatenate([image, *(p.batch.image(p.first, p.count) for p in rest)]) if rest else image

    def blame(self, right: Callable[[Array, Array], bool]) -> int:
        """Reject the makers of those parts of which `right`(r, image) is false; how many parts those are."""
        wrong = [p for p in self._parts if not right(p.batch.mask(p.first, p.count), p.batch.image(p.first, p.count))]
        for p in wrong:
            p.batch.maker.reject()
        return len(wrong)
