"""Which cores who computes on: what is measured has one to itself, whoever works for it has the others."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sliplm.errors import SlipError


def apart() -> tuple[list[int], list[int]]:
    """One of the cores that this process may use, and the others: the same one if it is alone. Raises SlipError where
    the system binds no process to a core."""
    if not hasattr(os, "sched_setaffinity"):
        raise SlipError("--streams binds processes to cores, which this system cannot do: run it on Linux.")
    first, *others = sorted(os.sched_getaffinity(0))
    return [first], others or [first]


@contextmanager
def on(cores: Collection[int]) -> Iterator[None]:
    """Processes and threads that this thread starts meanwhile begin on `cores`; on its own ones if there are none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
