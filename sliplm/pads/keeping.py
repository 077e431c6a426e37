"""What an owner says about the stock of pads: how large it may become, where it lies, and when it grows."""

from __future__ import annotations

import re
import time
from pathlib import Path

from sliplm.errors import BundleError
from sliplm.pads.pool import Pool
from sliplm.pads.spill import Spill

USUAL = 64
"""Tokens of which pads are kept ready in memory if nothing is said, and at any hour."""

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class Hours:
    """A part of every day by the local clock, "22:00-06:00": the first minute is in it, the last is not. Raises
    BundleError."""

    def __init__(self, said: str) -> None:
        found = _HOURS.fullmatch(said)
        if found is None or found[1] + found[2] == found[3] + found[4]:
            raise BundleError(f"{said!a} are no hours of the day: write HH:MM-HH:MM, as in 22:00-06:00.")
        hour, minute, last_hour, last_minute = (int(text) for text in found.groups())
        self._begin, self._end = 60 * hour + minute, 60 * last_hour + last_minute

    def now(self) -> bool:
        """Whether it is one of them. The clock alone decides, at every look: if it jumps, nothing else is lost."""
        clock = time.localtime()
        minute = 60 * clock.tm_hour + clock.tm_min
        if self._begin < self._end:
            return self._begin <= minute < self._end
        return minute >= self._begin or minute < self._end


class Keeping:
    """Keep pads ready for `stock` tokens (by default USUAL): in memory, or those beyond USUAL in `directory`. They are
    made at once whenever any are lacking, or, beyond USUAL, in the hours `fill_between` alone.

    Raises BundleError: nothing can be kept there, those are no hours, or a stock of no size was to be kept or filled.
    """

    def __init__(
        self, stock: int | None = None, directory: Path | str | None = None, fill_between: str | None = None
    ) -> None:
        if stock is None and (directory, fill_between) != (None, None):
            raise BundleError("say with --stock for how many tokens to keep one-time pads, on disk or over the day.")
        self._stock = USUAL if stock is None else stock
        self._hours = None if fill_between is None else Hours(fill_between)
        self._spill = None if directory is None else Spill(directory)
        always_all = directory is None and fill_between is None
        self.depth = self._stock if always_all else min(self._stock, USUAL)

    def rule(self, pool: Pool) -> None:
        """Let `pool` keep its pads so."""
        pool.resize(self.depth)
        pool.spill = self._spill
        pool.reserve = self._reserve

    def _reserve(self) -> int:
        closed = self._hours is not None and not self._hours.now()
        return 0 if closed or (self._spill is not None and self._spill.full) else self._stock
