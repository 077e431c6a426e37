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
        self._all: list[Array] = []  # flat
        self._most = 0  # elements that were ever in use at a time

    def array(self, rows: int, columns: int) -> Array:
        """An array (rows, columns) of anything."""
        size = rows * columns
        # Views, and views of those, hold on to the flat array. Two references are those of the list and of the call.
        idle = [i for i in range(len(self._all)) if sys.getrefcount(self._all[i]) == 2]
        fit = [i for i in idle if size <= self._all[i].size <= 2 * size]
        if fit:
            flat = self._all[min(fit, key=lambda i: self._all[i].size)]
        else:
            room = size + sum(a.size for a in self._all)
            self._most = max(self._most, room - sum(self._all[i].size for i in idle))
            for i in reversed(idle):  # so that the places of others stay
                if room > self._most:
                    room -= self._all.pop(i).size
            flat = np.empty(size, np.uint32)
            self._all.append(flat)
        return flat[:size].reshape(rows, columns)
