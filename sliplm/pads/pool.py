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
from collections import Counter
from collections.abc import Callable, Sequence

from sliplm.errors import BusyError, LinkError, locate
from sliplm.pads.pad import Array, Batch, Maker, Pad, Part
from sliplm.pads.parties import may_use
from sliplm.pads.sources import SelfSource
from sliplm.pads.spill import Spill, pieces
from sliplm.pads.stock import Job, Stock
from sliplm.prg import fresh_key

STALL_SECONDS = 1.0
"""What a maker has promised counts for so long after its last delivery; then others are asked for the same."""

JOB_BYTES = 8 << 20
JOB_ROWS = 256
"""The most that one job brings: bytes of images, and rows."""

BEAT_SECONDS = 0.25
NOBODY = "nobody makes one-time pads: say who does (--pads self:DIR/edge, or helpers)."

_log = logging.getLogger(__name__)


class Pool:
    """Pads of every group.

    Args:
        shapes: (M, K) of every group's Q.
        depth: tokens per group to keep ready, of the makers of each party; 0 makes every pad when it is taken.
        batch: the fewest tokens made at a time.
        patience: seconds that `take` waits for helpers.

    Attributes:
        own: the trusted side as a maker, if it is one.
        expected: how many helpers are to make each pad, who may not be there yet; 0 for none.
        spill: what keeps the images beyond `depth`, if they are not to stay in memory. Those that it has no room for
            are forgotten.
        reserve: tokens to keep ready at this hour, if they are more than `depth`.
        refused: how often `take` found pads of the edge's own party alone.
        changed: the lock of all that is here, notified of all that happens.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], depth: int = 64, batch: int = 16, patience: float = 5.0
    ) -> None:
        self.own: SelfSource | None = None
        self.expected = 0
        self.spill: Spill | None = None
        self.reserve: Callable[[], int] = lambda: 0
        self._shapes = list(shapes)
        self.refused = 0
        self._depth, self._batch, self._patience = depth, batch, patience
        self._lock = threading.RLock()  # entered itself where nobody waits: a condition does so in Python
        self.changed = self._state = threading.Condition(self._lock)
        self._stocks: dict[frozenset[str], Stock] = {}
        self._usable: dict[str | None, list[Stock]] = {}  # by the edge's party: those that it may use
        self._makers: dict[Maker, float] = {}  # and when each delivered last
        self._jobs: set[Job] = set()
        self._late: set[Maker] = set()  # those that owe: nobody counts on them until they deliver
        self._owing: set[str] = set()  # names of those that ever left, or stalled, with a job undone
        self._waiting: list[int] = []  # levels that callers of `wait` wait for
        self._short = Counter[tuple[str | None, int]]()  # rows that callers of `take` wait for, by edge and group
        self._dropped: list[str] = []  # the names that ever were, in order
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
    def stored(self) -> int:
        """Of `level`, those whose images are not in memory: at most as many, of the same groups."""
        with self._state:
            groups = range(len(self._shapes))
            kept = [sum(stock.rows(g, stored=True) for stock in self._stocks.values()) for g in groups]
            return min(kept, default=0)

    @property
    def depth(self) -> int:
        """Tokens that are always kept ready."""
        return self._depth

    @property
    def target(self) -> int:
        """The level that makers aim at now."""
        return max(self._depth, self.reserve())

    def _totals(self) -> list[int]:
        with self._lock:
            return [sum(levels) for levels in zip(*(s.levels for s in self._stocks.values()), strict=True)] or [0]

    def _stock(self, maker: Maker) -> Stock:
        stock = self._stocks.get(maker.parties)
        if stock is None:
            stock = self._stocks[maker.parties] = Stock(len(self._shapes))
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

    def take(self, group: int, tokens: int, edge: str | None) -> Pad:
        """Pads for `tokens` tokens of `group`, for an edge of the party `edge` (None: inside this process).

        The trusted side makes those that are lacking at once, if it is a maker; helpers are waited for.

        Raises LinkError if nobody makes any, BusyError if they do not come in time.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a pool of pads does not survive fork")
        deadline = time.monotonic() + self._patience
        parts: list[Part] = []
        dropped = len(self._dropped)
        while tokens:
            with self._lock:
                found = self._move(group, tokens, edge) or self._await(group, tokens, edge, deadline)
            for part in found or [self._make_now(group, tokens)]:
                if not part.batch.stored or self._loaded(part.batch):
                    parts.append(part)
                    tokens -= part.count
            if len(self._dropped) > dropped:  # while this waited: what it had of them is forgotten, too
                names = self._dropped[dropped:]
                gone, dropped = set(names), dropped + len(names)
                tokens += sum(part.count for part in parts if gone & part.batch.names)
                parts = [part for part in parts if not gone & part.batch.names]
        return Pad(parts)

    def ready(self, group: int, edge: str | None) -> bool:
        """Whether `take` need not wait for the first of them."""
        if self.own is not None:
            return True
        with self._lock:
            return any(stock.levels[group] and may_use(of, edge) for of, stock in self._stocks.items())

    def _await(self, group: int, missing: int, edge: str | None, deadline: float) -> list[Part]:
        """What comes of `missing` pads that are lacking, as soon as any do; none if the trusted side may make them."""
        if self._closed:
            raise RuntimeError("the pool of pads is closed")
        if self.own is not None:
            return []
        if not self.expected:
            raise LinkError(NOBODY)
        if any(stock.levels[group] for stock in self._stocks.values()):
            self.refused += 1
        self._short[edge, group] += missing
        self._state.notify_all()
        try:
            while not (found := self._move(group, missing, edge)):
                if not self._state.wait(deadline - time.monotonic()):
                    raise BusyError(self._why_none(edge))
                if self._closed:
                    raise RuntimeError("the pool of pads is closed")
            return found
        finally:
            self._short[edge, group] -= missing
            if not self._short[edge, group]:
                del self._short[edge, group]

    def _loaded(self, batch: Batch) -> bool:
        """Whether the images of `batch` are in memory now. If they were lost on disk, none of its pads is used."""
        try:
            batch.load()
            return True
        except OSError as error:
            _log.error("a batch of one-time pads is lost and others take its place: %s", error.strerror or error)
            with self._state:
                for stock in self._stocks.values():
                    stock.forget(lambda other: other is batch)
            return False

    def _move(self, group: int, tokens: int, edge: str | None) -> list[Part]:
        """Up to `tokens` pads that may be used with `edge`, out of the stock."""
        usable = self._usable.get(edge)
        if usable is None:
            usable = self._usable[edge] = [stock for of, stock in self._stocks.items() if may_use(of, edge)]
        if len(usable) > 1:
            usable = sorted(usable, key=lambda s: -s.levels[group])
        parts: list[Part] = []
        for stock in usable:
            ready = stock.ready[group]
            while tokens and ready:  # in place: a call for each stock would cost an exchange more
                part = ready[0]
                if part.count > tokens:
                    parts.append(Part(part.batch, part.first, tokens))
                    part.first, part.count = part.first + tokens, part.count - tokens
                else:
                    parts.append(ready.popleft())
                tokens -= parts[-1].count
                stock.levels[group] -= parts[-1].count
                if stock.levels[group] <= self._depth - self._batch or not stock.levels[group]:
                    self._state.notify_all()  # wakes makers for whole batches only
        return parts

    def _make_now(self, group: int, tokens: int) -> Part:
        assert self.own is not None
        key = fresh_key()
        images = self.own.image(group, key, tokens, 0)
        return Part(Batch(self.own, [key], tokens, self._shapes[group][1], images), 0, tokens)

    def _why_none(self, edge: str | None) -> str:
        if not any(may_use(maker.parties, edge) for maker in self._makers):
            who = "no helper of another party" if self.expected == 1 else "no two helpers of two other parties"
            return f"{who} than this edge's is connected to make one-time pads: try again later"
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
            if maker.name in self._owing:
                self._late.add(maker)
            self._state.notify_all()

    def dismiss(self, maker: Maker) -> None:
        """No more jobs for `maker`; others do those that it has. Its finished pads stay."""
        with self._state:
            self._makers.pop(maker, None)
            self._late.discard(maker)
            for job in [job for job in self._jobs if job.maker is maker]:
                self._owing.add(maker.name)
                self._forget(job)
            self._state.notify_all()

    def drop(self, name: str) -> int:
        """Dismiss the makers of this name and forget every unused pad that they made or had a part in; how many."""
        with self._state:
            self._dropped.append(name)
            for maker in [maker for maker in self._makers if maker.name == name]:
                self.dismiss(maker)
            for job in [job for job in self._jobs if any(half.maker.name == name for half in job.halves)]:
                self._forget(job)
            return sum(stock.forget(lambda batch: name in batch.names) for stock in self._stocks.values())

    def job(self, maker: Maker, timeout: float) -> Job | None:
        """What `maker` should make next; None if there is nothing for `timeout` seconds, or nothing any more."""
        deadline = time.monotonic() + timeout
        with self._state:
            while not self._closed:
                self._expire()
                # One that was dismissed waits in vain, and then sees that it has to go. A plan may mask nothing.
                hired = maker in self._makers and bool(self._shapes)
                if hired and (next := self._lacking(self._stock(maker), maker.parties)) is not None:
                    job = Job(maker, *next, late=maker in self._late)
                    self._jobs.add(job)
                    if job.counted:
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
            self._makers[job.maker] = time.monotonic()
            self._late.discard(job.maker)
            stock, short = self._stock(job.maker), self._short_of(job.maker.parties)[job.group]
            if job.late:  # others have been asked for the same
                images = images[: max(0, self.target + short - stock.levels[job.group])].copy()
            room = self._depth + short - stock.rows(job.group, stored=False)
        batches = self._batches(job, images, room)
        with self._state:
            if job not in self._jobs:
                return
            self._forget(job)
            for batch in batches:  # what is in memory goes first
                self._stock(job.maker).put(job.group, batch, first=self.spill is not None and not batch.stored)
            self._state.notify_all()

    def _batches(self, job: Job, images: Array, room: int) -> list[Batch]:
        """What `job` brought, with `room` rows in memory if there is somewhere else for the rest. Loaded again, a piece
        of that takes no more memory than what is there anyway."""
        kept = pieces(images, room, max(self._depth, self._batch), self.spill)
        width, keys = self._shapes[job.group][1], [half.key for half in job.halves]
        names = {half.maker.name for half in job.halves}
        return [Batch(job.maker, keys, count, width, images, begin, names) for begin, images, count in kept]

    def _forget(self, job: Job) -> None:
        self._jobs.discard(job)
        if job.counted:
            self._stock(job.maker).coming[job.group] -= job.count

    def _expire(self) -> None:
        """Count no more on what makers that have stalled were to bring, nor on them until they deliver."""
        now = time.monotonic()
        for job in self._jobs:
            if job.counted and now - max(job.issued, self._makers[job.maker]) > STALL_SECONDS:
                job.counted, job.late = False, True  # if it comes after all, what is lacking of it is welcome
                self._late.add(job.maker)
                self._owing.add(job.maker.name)
                self._stock(job.maker).coming[job.group] -= job.count

    def _short_of(self, parties: frozenset[str]) -> Counter[int]:
        """The rows that callers of `take` wait for, by group, who may use pads of these parties."""
        short = Counter[int]()
        for (edge, group), rows in self._short.items():
            if may_use(parties, edge):
                short[group] += rows
        return short

    def _lacking(self, stock: Stock, parties: frozenset[str]) -> tuple[int, int] | None:
        """The group that lacks most, and how many rows to make of it; None if none lacks a batch, as small ones cost
        more a token."""
        target, short = self.target, self._short_of(parties)
        expected = [have + coming for have, coming in zip(stock.levels, stock.coming, strict=True)]
        for group, rows in short.items():
            expected[group] -= rows
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
