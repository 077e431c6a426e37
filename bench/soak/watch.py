"""Logs of the pads that a trusted side uses or finds wrong, and of the rows that an edge sees: to check that none comes
twice, and that no wrong one was used and not found.

The program itself cannot keep such a log: a switch for it would be one more thing that can be on by mistake. The
experiment's own processes run it with these functions in front.

What is logged of a pad is not the pad r (K numbers for one token), but HMAC(key, r), where the key is drawn for one
experiment and thrown away with it.

*It gives nothing away.* Without the key, HMAC-SHA256 of distinct inputs is indistinguishable from random bytes; a bare
hash would let somebody who sees the masked row x + r test a guess of x.

*Distinct entries imply what we want.* `Pad.mask` is the only way to r, and an entry is written, in one call that
survives kill -9, before it returns; so every pad that ever masked anything is in the log. If two exchanges, of
whatever process or group, had used one pad, their entries would be equal. (The converse fails with probability 2^-128:
the entries are 16 bytes long.)

The edge's log needs no such trust: the experiment asks the same question again and again, so the same inputs are masked
over and over, and two equal rows would show that they were masked with one pad.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

ENTRY = 16


def pads(log: Path, key: bytes) -> None:
    """From now on, write an entry for each row of every pad that this process uses."""
    from sliplm.pads.pad import Pad

    handle = _open(log)
    take = Pad.mask

    def mask(self: Pad) -> np.ndarray:
        rows = take(self)
        _write(handle, key, rows)
        return rows

    Pad.mask = mask  # type: ignore[method-assign]


def wrong(log: Path, key: bytes) -> None:
    """From now on, write an entry for each row of every part of a pad that this process finds wrong."""
    from sliplm.pads.pad import Pad

    handle = _open(log)
    blame = Pad.blame

    def note(self: Pad, right: Callable[[np.ndarray, np.ndarray], bool]) -> int:
        def check(mask: np.ndarray, image: np.ndarray) -> bool:
            if not (fine := right(mask, image)):
                _write(handle, key, mask)
            return fine

        return blame(self, check)

    Pad.blame = note  # type: ignore[method-assign]


def rows(log: Path, key: bytes) -> None:
    """From now on, write an entry for each row that this edge multiplies."""
    from sliplm.edge.multiplier import Multiplier

    handle = _open(log)
    multiply = Multiplier.product

    def product(self: Multiplier, group: int, x: np.ndarray, *args, **options) -> np.ndarray:
        _write(handle, key, x, group)
        return multiply(self, group, x, *args, **options)

    Multiplier.product = product  # type: ignore[method-assign]


def count(log: Path) -> tuple[int, int]:
    """How many entries there are, and how many of them are repetitions."""
    data = np.fromfile(log, np.dtype((np.void, ENTRY)))
    return len(data), len(data) - len(np.unique(data))


def read(log: Path) -> set[bytes]:
    """The entries, without repetitions."""
    data = log.read_bytes() if log.exists() else b""
    return {data[i : i + ENTRY] for i in range(0, len(data), ENTRY)}


def entries(key: bytes, rows: np.ndarray, group: int = 0) -> list[bytes]:
    """What stands in a log for `rows`; for those of a pad, the group is left out."""
    label = group.to_bytes(4, "little")
    return [hmac.digest(key, label + row.tobytes(), "sha256")[:ENTRY] for row in np.ascontiguousarray(rows)]


def _open(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _write(handle: int, key: bytes, rows: np.ndarray, group: int = 0) -> None:
    data = b"".join(entries(key, rows, group))
    if os.write(handle, data) != len(data):
        raise OSError("the log of pads could not be written")
