"""How fast an edge is, and which rows of an exchange each of several computes."""

from __future__ import annotations

from collections.abc import Sequence

Line = tuple[float, float]
"""(a, b): r > 0 rows take a + b r seconds. b is positive."""

SIZE, ROWS = 1 << 22, 16
"""Of an ordinary exchange: what the three parts of its time are weighed by, so that they are about alike."""

NEW = 8
"""So many exchanges tell how fast an edge is; a later one counts an eighth."""

GAIN = 1.25
HANDING_SECONDS = 3e-4
"""Rows are spread if one edge alone would take so many times as long, and a thread's start more."""


class Speed:
    """What one edge's exchanges take, learned from them: seconds = latency + size (reading + rows each), where the
    size is that of the group's matrix, M K. One exchange of any group says something about all."""

    __slots__ = ("count", "each", "latency", "reading")

    def __init__(self) -> None:
        self.count = 0
        self.latency = self.reading = self.each = 0.0  # the latter two for SIZE numbers, and for ROWS rows of them

    @property
    def known(self) -> bool:
        return self.count >= NEW

    def line(self, size: int) -> Line:
        """For the groups of a size."""
        units = size / SIZE
        return self.latency + units * self.reading, max(1e-9, units * self.each / ROWS)

    def learn(self, size: int, rows: int, seconds: float) -> None:
        """Take note of an exchange: of all that would explain it, come nearer to what is least away from what is known.
        One that took very long counts as three times the expected: there may be no more like it."""
        units = size / SIZE
        more = units * rows / ROWS
        expected = self.latency + units * self.reading + more * self.each
        if self.count >= NEW:
            seconds = min(seconds, max(3 * expected, 1e-3))
        self.count += 1
        change = max(1 / self.count, 1 / NEW) * (seconds - expected) / (1 + units * units + more * more)
        self.latency = max(0.0, self.latency + change)
        self.reading = max(0.0, self.reading + change * units)
        self.each = max(0.0, self.each + change * more)


def spread(lines: Sequence[Line], rows: int) -> list[int]:
    """How many of `rows` each edge computes, for the last to be done as early as it can be; those with none take no
    time.

    Those that are there at the time t could have done (t - a) / b rows. At the least t at which that is enough in real
    numbers, whole rows are too few by less than one an edge; the rest go, one by one, to where they are done first.
    """
    inverse = weighed = level = 0.0
    for i, (a, b) in enumerate(sorted(lines)):
        if i and a >= level:
            break
        inverse, weighed = inverse + 1 / b, weighed + a / b
        level = (rows + weighed) / inverse
    shares = [min(rows, max(0, int((level - a) / b - 1e-6))) for a, b in lines]
    while (left := rows - sum(shares)) > 0:
        first = min(range(len(lines)), key=lambda i: lines[i][0] + lines[i][1] * (shares[i] + 1))
        shares[first] += 1
    while left < 0:  # only where rounding has made one row too many of it
        last = max((i for i in range(len(lines)) if shares[i]), key=lambda i: lines[i][0] + lines[i][1] * shares[i])
        shares[last] -= 1
        left += 1
    return shares


def shares(lines: Sequence[Line], rows: int) -> list[int]:
    """The same, but all for the fastest where spreading gains little."""
    alone = [a + b * rows for a, b in lines]
    best = min(range(len(lines)), key=alone.__getitem__)
    if rows > 1 < len(lines):
        apart = spread(lines, rows)
        together = max(a + b * share for (a, b), share in zip(lines, apart, strict=True) if share)
        if alone[best] > GAIN * together + HANDING_SECONDS:
            return apart
    return [rows if i == best else 0 for i in range(len(lines))]
