"""Memory for the images of pads that is used again: pages that the system has to find and to clear first cost the
trusted side as much as receiving what is then written to them."""

from __future__ import annotations

import sys

import numpy as np

from sliplm.pads.pad import Array


class Buffers:
    """Arrays for one thread, each used again once nobody looks at it any more. Together they never take more memory
    than was in use at a time."""

    def __init__(self) -> None:
        self._all: list[Array] = []  # flat, the one that was given out longest ago first
        self._sizes: list[int] = []  # of those: to ask each would take longer than to receive what is written to it
        self._most = 0  # elements that were ever in use at a time

    def array(self, rows: int, columns: int) -> Array:
        """An array (rows, columns) of anything."""
        size = rows * columns
        place = self._fit(size)
        flat = self._fresh(size) if place is None else self._pop(place)
        self._all.append(flat)
        self._sizes.append(flat.size)
        return flat[:size].reshape(rows, columns)

    def _pop(self, place: int) -> Array:
        del self._sizes[place]
        return self._all.pop(place)

    # Views, and views of those, hold on to their flat array. Of one that is idle, the two references are those of the
    # list and of the call.

    def _fit(self, size: int) -> int | None:
        """The place of an idle array for so many elements, not far too large for them. Pads are used in the order in
        which they are made, so it is one of the first that are looked at, mostly."""
        arrays = self._all
        for place, room in enumerate(self._sizes):
            if size <= room <= 2 * size and sys.getrefcount(arrays[place]) == 2:
                return place
        return None

    def _fresh(self, size: int) -> Array:
        arrays, sizes = self._all, self._sizes
        idle = [place for place in range(len(arrays)) if sys.getrefcount(arrays[place]) == 2]
        room = size + sum(sizes)
        self._most = max(self._most, room - sum([sizes[place] for place in idle]))
        for place in reversed(idle):  # so that the places of others stay
            if room > self._most:
                room -= sizes[place]
                self._pop(place)
        return np.empty(size, np.uint32)
