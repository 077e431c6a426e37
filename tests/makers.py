"""Makers of pads in this process, which do what tests tell them."""

from __future__ import annotations

import numpy as np

from sliplm import kernels
from sliplm.pads.pool import Pool
from sliplm.pads.stock import Job
from sliplm.prg import expand

SHAPES = [(3, 6), (4, 2)]


def matrices(*shapes: tuple[int, int]) -> list[kernels.IntMatrix]:
    rng = np.random.default_rng(0)
    return [kernels.prepare(rng.integers(-127, 128, s).astype(np.int8)) for s in shapes]


class Helper:
    """A maker of a party, in this process, that does jobs when it is told."""

    def __init__(self, pool: Pool, party: str, name: str = "") -> None:
        self.pool, self.parties, self.name = pool, frozenset({party}), name or f"device of {party}"
        self.rejected = 0
        self.matrices = matrices(*SHAPES)
        pool.expected = True
        pool.hire(self)

    def reject(self) -> None:
        self.rejected += 1
        self.pool.drop(self.name)

    def take(self) -> Job | None:
        return self.pool.job(self, 0)

    def finish(self, job: Job) -> None:
        r = expand(job.key, 0, job.count, SHAPES[job.group][1])
        self.pool.deliver(job, self.matrices[job.group].product(r))

    def fill(self) -> None:
        while job := self.take():
            self.finish(job)
