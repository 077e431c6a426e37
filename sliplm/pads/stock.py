"""Jobs for makers of pads, and what they brought until it is used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from sliplm.pads.pad import Batch, Maker, Part
from sliplm.prg import fresh_key


class Job:
    """`count` images of a group, the key's first rows, wanted from a maker. `halves` are the jobs whose sum it is:
    itself alone, or those of two helpers (`sliplm.pads.pairs`)."""

    __slots__ = ("count", "counted", "group", "halves", "issued", "key", "late", "maker")

    def __init__(self, maker: Maker, group: int, count: int, late: bool = False) -> None:
        self.maker, self.group, self.count = maker, group, count
        self.key = fresh_key()
        self.issued = time.monotonic()
        self.counted = not late  # as on its way
        self.late = late  # others are asked for the same
        self.halves: tuple[Job, ...] = (self,)

    def __reduce__(self) -> str:
        raise TypeError("a job holds a key and cannot be copied")

    def __repr__(self) -> str:
        return f"Job(group={self.group}, count={self.count}, <secret>)"


class Stock:
    """The pads of makers of the same parties: batches by group, how many rows are left, and how many on their way.
    Whoever calls it holds the lock of the pool that it is of."""

    def __init__(self, groups: int) -> None:
        self.ready: list[deque[Part]] = [deque() for _ in range(groups)]
        self.levels = [0] * groups
        self.coming = [0] * groups

    def rows(self, group: int, stored: bool) -> int:
        """How many rows are ready whose images are in memory; or `stored` elsewhere."""
        return sum(part.count for part in self.ready[group] if part.batch.stored == stored)

    def put(self, group: int, batch: Batch, first: bool = False) -> None:
        """Add a batch, to be used `first` or last."""
        (self.ready[group].appendleft if first else self.ready[group].append)(Part(batch, 0, batch.count))
        self.levels[group] += batch.count

    def forget(self, unwanted: Callable[[Batch], bool]) -> int:
        """Drop the rows of batches that are `unwanted`; how many."""
        before = sum(self.levels)
        for group, ready in enumerate(self.ready):
            self.ready[group] = deque(part for part in ready if not unwanted(part.batch))
            self.levels[group] = sum(part.count for part in self.ready[group])
        return before - sum(self.levels)
