"""The stock of one-time pads: who needs which is answered from it, and who makes some is told what is lacking.

That no pad is used twice holds by construction:

* every batch has keys of its own, drawn for it, sent to nobody but its maker, and in this process's memory only;
* `take` moves rows out of the stock under a lock, so no two callers can receive the same one;
* a `Pad` gives its r once: the second reading raises. Whoever retries after a failure takes a new pad;
* after fork the child's pool refuses to work.

What this cannot rule out is a machine whose whole memory is copied and resumed twice: both copies then use the pads
that lay in the stock, and none that were made later (docs/security.md).

Makers ask for jobs, deliver, and ask again: several share the work by their speed, and nothing waits for one of them.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from sliplm.errors import BusyError, LinkError, locate
from sliplm.pads.pad import Array, Batch, Images, Maker, Pad, Part
from sliplm.pads.parties import may_use
from sliplm.pads.sources import SelfSource
from sliplm.prg import fresh_key

STALL_SECONDS = 1.0
"""What a maker has promised counts for so long after its last delivery; then others are asked for the same."""

JOB_BYTES = 8 << 20
JOB_ROWS = 256
"""The most that one job brings: bytes of images, and rows."""

BEAT_SECONDS = 0.25
NOBODY = "nobody makes one-time pads: say who does (--pads self:DIR/edge, or helpers)."

_log = logging.getLogger(__name__)


class Job:
    """`count` images of a group, the key's first rows, wanted from a maker."""

    __slots__ = ("count", "counted", "group", "issued", "key", "maker")

    def __init__(self, maker: Maker, group: int, count: int) -> None:
        self.maker, self.group, self.count = maker, group, count
        self.key = fresh_key()
        self.issued = time.monotonic()
        self.counted = True  # as on its way

    def __repr__(self) -> str:
        return f"Job(group={self.group}, count={self.count}, <secret>)"


class _Stock:
    """The pads of makers of the same parties: batches by group, how many rows are left, and how many on their way."""

    def __init__(self, groups: int) -> None:
        self.ready: list[deque[Part]] = [deque() for _ in range(groups)]
        self.levels = [0] * groups
        self.coming = [0] * groups


class Pool:
    """Pads of every group.

    Args:
        shapes: (M, K) of every group's Q.
        depth: tokens per group to keep ready, of the makers of each party; 0 makes every pad when it is taken.
        batch: the fewest tokens made at a time.
        patience: seconds that `take` waits for helpers.

    Attributes:
        own: the trusted side as a maker, if it is one.
        expected: whether helpers are to make them, who may not be there yet.
        spill: what keeps the images beyond `depth`, if they are not to stay in memory.
        reserve: tokens to keep ready at this hour, if they are more than `depth`.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], depth: int = 64, batch: int = 16, patience: float = 5.0
    ) -> None:
        self.own: SelfSource | None = None
        self.expected = False
        self.spill: Callable[[Array], Images] | None = None
        self.reserve: Callable[[], int] = lambda: 0
        self._shapes = list(shapes)
        self._depth, self._batch, self._patience = depth, batch, patience
        self._lock = threading.RLock()  # entered itself where nobody waits: a condition does so in Python
        self._state = threading.Condition(self._lock)
        self._stocks: dict[frozenset[str], _Stock] = {}
        self._usable: dict[str | None, list[_Stock]] = {}  # by the edge's party: those that it may use
        self._makers: dict[Maker, float] = {}  # and when each delivered last
        self._jobs: set[Job] = set()
        self._waiting: list[int] = []  # levels that callers of `wait` wait for
        self._short = [0] * len(self._shapes)  # rows that callers of `take` wait for
        self._pid = os.getpid()
        self._filler: threading.Thread | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Pool(groups={len(self._shapes)}, level={self.level})"

    @property
    def level(self) -> int:
        """Tokens for which every group has a pad ready, whoever made it."""
        return min(self._totals(), default=0)

    @property
    def mean_level(self) -> float:
        """The same, averaged over groups."""
        return sum(self._totals()) / max(1, len(self._shapes))

    @property
    def depth(self) -> int:
        """The level that makers aim at."""
        return self._depth

    @property
    def makers(self) -> list[Maker]:
        """Who makes pads now."""
        with self._state:
            return list(self._makers)

    def _totals(self) -> list[int]:
        return [sum(levels) for levels in zip(*(s.levels for s in self._stocks.values()), strict=True)] or [0]

    def _stock(self, maker: Maker) -> _Stock:
        stock = self._stocks.get(maker.parties)
        if stock is None:
            stock = self._stocks[maker.parties] = _Stock(len(self._shapes))
            self._usable.clear()
        return stock

    def resize(self, depth: int) -> None:
        """Keep `depth` pads per group ready from now on."""
        with self._state:
            self._depth = depth
            self._state.notify_all()

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._filler is not None:
            self._filler.join()
        self._stocks.clear()
        self._usable.clear()

    def wait(self, tokens: int, timeout: float | None = None) -> bool:
        """Wait until `tokens` (at most the depth) pads are ready in every group; false after `timeout` seconds."""
        with self._state:
            self._waiting.append(tokens)
            self._state.notify_all()
            try:
                return self._state.wait_for(lambda: self.level >= min(tokens, self._depth) or self._closed, timeout)
            finally:
                self._waiting.remove(tokens)

    # --- using pads -----------------------------------------------------------------------------------------

    def take(self, group: int, tokens: int, edge: str | None = None) -> Pad:
        """Pads for `tokens` tokens of `group`, for an edge of the party `edge` (None: inside this process).

        The trusted side makes those that are lacking at once, if it is a maker; helpers are waited for.

        Raises LinkError if nobody makes any, BusyError if they do not come in time.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a pool of pads does not survive fork")
        parts: list[Part] = []
        missing = tokens
        with self._lock:
            deadline = time.monotonic() + self._patience
            while missing := missing - self._move(group, missing, edge, parts):
                if self._closed:
                    raise RuntimeError("the pool of pads is closed")
                if self.own is not None:
                    break
                if not self.expected:
                    raise LinkError(NOBODY)
                self._short[group] += missing
                self._state.notify_all()
                try:
                    if not self._state.wait(deadline - time.monotonic()):
                        raise BusyError(self._why_none(edge))
                finally:
                    self._short[group] -= missing
        if missing:
            parts.append(self._make_now(group, missing))
        return Pad(parts)

    def _move(self, group: int, tokens: int, edge: str | None, parts: list[Part]) -> int:
        """Move up to `tokens` pads that may be used with `edge` out of the stock, to `parts`; how many."""
        usable = self._usable.get(edge)
        if usable is None:
            usable = self._usable[edge] = [stock for of, stock in self._stocks.items() if may_use(of, edge)]
        if len(usable) > 1:
            usable = sorted(usable, key=lambda s: -s.levels[group])
        missing = tokens
        for stock in usable:
            ready = stock.ready[group]
            while missing and ready:
                part = ready[0]
                if part.count > missing:
                    parts.append(Part(part.batch, part.first, missing))
                    part.first, part.count = part.first + missing, part.count - missing
                else:
                    parts.append(ready.popleft())
                missing -= parts[-1].count
                stock.levels[group] -= parts[-1].count
                if stock.levels[group] <= self._depth - self._batch or not stock.levels[group]:
                    self._state.notify_all()  # wakes makers for whole batches only
        return tokens - missing

    def _make_now(self, group: int, tokens: int) -> Part:
        assert self.own is not None
        key = fresh_key()
        images = self.own.image(group, key, tokens, 0)
        return Part(Batch(self.own, [key], tokens, self._shapes[group][1], images), 0, tokens)

    def _why_none(self, edge: str | None) -> str:
        if not any(may_use(maker.parties, edge) for maker in self._makers):
            return "no helper of another party than this edge's is connected to make one-time pads: try again later"
        return "one-time pads are used faster than the helpers make them: try again later"

    # --- making pads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the trusted side fill the stock in the background, if it is a maker and there is to be a stock."""
        with self._state:
            if self._depth and self.own is not None and self._filler is None and not self._closed:
                # A thread inside the kernels while the interpreter takes them down would abort the process.
                atexit.register(self.close)
                self._filler = threading.Thread(target=self._fill, args=(self.own,), name="pads", daemon=True)
                self._filler.start()

    def hire(self, maker: Maker) -> None:
        """Let `maker` ask for jobs."""
        with self._state:
            self._makers[maker] = time.monotonic()
            self._state.notify_all()

    def dismiss(self, maker: Maker) -> None:
        """No more jobs for `maker`; others do those that it has. Its finished pads stay."""
        with self._state:
            self._makers.pop(maker, None)
            for job in [job for job in self._jobs if job.maker is maker]:
                self._forget(job)
            self._state.notify_all()

    def drop(self, name: str) -> int:
        """Dismiss the makers of this name and forget every unused pad of theirs; how many."""
        dropped = 0
        with self._state:
            for maker in [maker for maker in self._makers if maker.name == name]:
                self.dismiss(maker)
            for stock in self._stocks.values():
                for group, ready in enumerate(stock.ready):
                    kept = deque(part for part in ready if part.batch.maker.name != name)
                    gone = sum(part.count for part in ready) - sum(part.count for part in kept)
                    stock.ready[group], stock.levels[group] = kept, stock.levels[group] - gone
                    dropped += gone
        return dropped

    def job(self, maker: Maker, timeout: float) -> Job | None:
        """What `maker` should make next; None if there is nothing for `timeout` seconds, or nothing any more."""
        deadline = time.monotonic() + timeout
        with self._state:
            while not self._closed and maker in self._makers:
                self._expire()
                if (next := self._lacking(self._stock(maker))) is not None:
                    job = Job(maker, *next)
                    self._jobs.add(job)
                    self._stock(maker).coming[job.group] += job.count
                    return job
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._state.wait(min(left, BEAT_SECONDS))
        return None

    def deliver(self, job: Job, images: Array) -> None:
        """Put what `job` asked for, (count, M), into the stock; if its maker was dismissed meanwhile, nowhere."""
        with self._state:
            if job not in self._jobs:
                return
            self._forget(job)
            self._makers[job.maker] = time.monotonic()
            stock = self._stock(job.maker)
            batch = Batch(job.maker, [job.key], job.count, self._shapes[job.group][1], images)
            beyond = stock.levels[job.group] >= self._depth
            stock.ready[job.group].append(Part(batch, 0, job.count))
            stock.levels[job.group] += job.count
            self._state.notify_all()
        if beyond and self.spill is not None:
            batch.store(self.spill)

    def _forget(self, job: Job) -> None:
        self._jobs.discard(job)
        if job.counted:
            self._stock(job.maker).coming[job.group] -= job.count

    def _expire(self) -> None:
        """Count no more on what makers that have stalled were to bring; if it comes after all, it is welcome."""
        now = time.monotonic()
        for job in self._jobs:
            if job.counted and now - max(job.issued, self._makers[job.maker]) > STALL_SECONDS:
                job.counted = False
                self._stock(job.maker).coming[job.group] -= job.count

    def _lacking(self, stock: _Stock) -> tuple[int, int] | None:
        """The group that lacks most, and how many rows to make of it; None if none lacks a batch, as small ones cost
        more a token."""
        target = max(self._depth, self.reserve())
        expected = [
            have + coming - short for have, coming, short in zip(stock.levels, stock.coming, self._short, strict=True)
        ]
        group = min(range(len(expected)), key=expected.__getitem__)
        level = expected[group]
        wanted = min(max(self._waiting, default=1), self._depth)
        if level >= wanted and level + self._batch > target:
            return None
        most = max(self._batch, min(JOB_ROWS, JOB_BYTES // (4 * self._shapes[group][0])))
        return group, max(1, min(most, target - level))

    def _fill(self, own: SelfSource) -> None:
        self.hire(own)
        while not self._closed:
            if (job := self.job(own, BEAT_SECONDS)) is None:
                continue
            try:
                self.deliver(job, own.image(job.group, job.key, job.count, 1))
            except Exception as error:  # too little memory, say: later there may be more
                _log.error("one-time pads could not be made: %s", locate(error))
                with self._state:
                    self._forget(job)
                    self._state.wait(STALL_SECONDS)
