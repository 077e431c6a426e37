"""Several edges behind one model: any of them may compute any row, since all that it sees is uniform numbers.

The rule. Rows go to an idle edge, or to several, so that the last is expected to be done as early as can be
(`sliplm.exchange.shares`); whoever finds a faster one busy waits for it if that is sooner. An edge that has not been
asked for long gets a few rows now and then, for what is known of it to stay true.

An edge that dies, stalls or lies is out, and the rows that it had are asked of another, as an exchange of their own:
with fresh pads, so that no two edges ever see the same masked row.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from sliplm.errors import LinkError, NoWorkerError, VerificationError
from sliplm.exchange.link import PARTS, Field, Link, Own, Router
from sliplm.exchange.shares import Speed, shares

if TYPE_CHECKING:
    from sliplm.exchange.operator import Operator
    from sliplm.exchange.step import Rows
    from sliplm.pads.pool import Pool

    Step = Callable[[Operator, Rows, Pool, Link, Callable[[Rows], Rows]], Rows]

STALL_SECONDS, STALL_TIMES, STALL_NEW_SECONDS = 1.0, 8, 5.0
"""An answer that takes longer, and so many times as long as expected, is waited for no more if there is another edge;
the last is for edges of which nothing is known yet."""

TRY_SECONDS, TRY_TIMES = 0.5, 50
"""An idle edge is tried so long after its last exchange, and so many times as long as one row takes it: a slow one
costs little."""

FEW = 4
"""An edge that is tried, or new, gets so many rows whole, and of more a sixteenth."""

SOONER = 0.8
"""A busy edge is waited for if the rows are done there in so much of the time that an idle one takes."""

BEAT_SECONDS = 0.25
AGAIN_SECONDS, FORGIVEN_SECONDS = 1.0, 600.0
"""An edge whose link failed, and that comes back, is asked so long after the failure, twice as long after each further
one; earlier only if there is no other. So it cannot hold up an exchange each time that it connects."""

FAILURES = 16
"""After so many in one exchange it is given up."""

NO_EDGE = "there is no worker connected: start `slip edge`, or try again soon"


class Edge(Link):
    """One edge of a pool: its link with a clock. `turn` is held by whoever exchanges over it."""

    def __init__(self, link: Link, name: str, lied: Callable[[], object], rows: Counter[str], after: float) -> None:
        self.link, self.name, self.lied = link, name, lied
        self.after = after  # it is asked from then on, or if there is no other
        self.party = link.party
        self.turn = threading.Lock()
        self.speed = Speed()
        self.since = math.inf  # when the question was sent whose answer is waited for
        self.limit = math.inf  # seconds for that
        self.begun = self.until = 0.0  # of the last turn: when it began, and was to end
        self._rows = rows

    def __repr__(self) -> str:
        return f"Edge({self.name})"

    @property
    def alive(self) -> bool:
        return self.link.alive

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        begin = self.since = perf_counter()
        try:
            answer = self.link.exchange(group, x, own)
        finally:
            self.since = math.inf
        self.speed.learn(x.shape[1] * answer[0].shape[1], len(x), perf_counter() - begin)
        self._rows[self.name] += len(x)
        return answer

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        begin, rows, size = perf_counter(), 0, 0

        def counted() -> Iterator[Field]:
            nonlocal size
            while True:
                self.since = math.inf  # making a question is not the edge's time
                x = next(questions, None)
                self.since = perf_counter()
                if x is None:
                    return
                size = x.shape[1]
                yield x

        with closing(self.link.exchanges(group, counted(), own)) as answers:
            try:
                while True:
                    self.since = perf_counter()
                    answer = next(answers, None)
                    self.since = math.inf
                    if answer is None:
                        break
                    rows += len(answer)
                    self._rows[self.name] += len(answer)
                    width = answer.shape[1]
                    yield answer
            finally:
                self.since = math.inf
        if rows:
            self.speed.learn(size * width, rows, perf_counter() - begin)

    def close(self) -> None:
        self.link.close()

    def seconds(self, size: int, rows: int) -> float:
        """What an exchange is expected to take."""
        a, b = self.speed.line(size)
        return a + b * rows

    def take(self, now: float, seconds: float) -> bool:
        """Begin a turn that is expected to last for so long, if nobody else has; whether that is so."""
        if not self.turn.acquire(blocking=False):
            return False
        self.begun, self.until = now, now + seconds
        self.limit = max(STALL_SECONDS, STALL_TIMES * seconds) if self.speed.known else STALL_NEW_SECONDS
        return True

    def free_in(self, now: float) -> float:
        """Seconds until this turn ends; of one that should have ended, as long again as it has taken."""
        return self.until - now if self.until > now else now - self.begun


class Edges(Router):
    """The edges that there are now. Safe to call from several threads.

    Args:
        patience: seconds that an exchange waits for an edge if there is none.

    Attributes:
        rows: how many each edge has computed, by its name, those included that are gone.
        replaced: how often an edge failed and its rows were asked of another.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self.rows = Counter[str]()
        self.replaced = 0
        self._patience = patience
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._edges: list[Edge] = []  # newest last; a new list whenever it changes
        self._failed: dict[str, tuple[int, float]] = {}  # how often the links of a name did, and when it may come back
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None
        self._threads = ThreadPoolExecutor(256, "rows")

    def __repr__(self) -> str:
        return f"Edges({len(self._edges)})"

    # --- who is there ---------------------------------------------------------------------------------------

    def add(self, link: Link, name: str, lied: Callable[[], object] = lambda: None) -> None:
        """Ask this edge, too, from now on. `lied` is called once if an answer of its is wrong; its link has been closed
        then."""
        with self._lock:
            _, again = self._failed.get(name, (0, 0.0))
            if perf_counter() > again + FORGIVEN_SECONDS:
                self._failed.pop(name, None)
            self.rows[name] += 0
            self._edges = [*self._edges, Edge(link, name, lied, self.rows, again)]
            if len(self._edges) > 1 and self._watch is None and not self._closed.is_set():
                self._watch = threading.Thread(target=self._end_stalled, name="edges", daemon=True)
                self._watch.start()
            self._changed.notify_all()

    def remove(self, link: Link) -> None:
        """Ask it no more. Its exchange under way goes on."""
        with self._lock:
            self._edges = [edge for edge in self._edges if edge.link is not link]

    def close(self) -> None:
        """Let nobody wait any more."""
        self._closed.set()
        with self._lock:
            self._changed.notify_all()
        self._threads.shutdown(wait=False)

    def wait(self) -> None:
        """Until there is an edge. Raises NoWorkerError if none comes in time."""
        with self._lock:
            self._await_one(perf_counter() + self._patience)

    def pick(self, name: str | None = None) -> Link:
        """One link that is alive, the newest of the edge of this name if there is one: for what is kept on an edge from
        one exchange to the next. Raises NoWorkerError if there is none in time."""
        deadline = perf_counter() + self._patience
        with self._lock:
            while True:
                self._await_one(deadline)
                alive = [edge for edge in self._edges if edge.alive]
                if alive:
                    return max(alive, key=lambda edge: edge.name == name).link
                self._edges = []

    def _await_one(self, deadline: float) -> None:
        while not self._edges or self._closed.is_set():
            if (left := deadline - perf_counter()) <= 0 or self._closed.is_set():
                raise NoWorkerError(NO_EDGE)
            self._changed.wait(left)

    # --- exchanges ------------------------------------------------------------------------------------------

    def run(self, step: Step, op: Operator, x: Rows, pads: Pool, own: Callable[[Rows], Rows]) -> Rows:
        """A group's output for x (T, K), by `step` over the edges that there are. `own` is called in this thread: once
        while edges are busy, and again if one failed that had all the rows.

        Raises:
            NoWorkerError: there is no edge. LinkError: there are no pads, or too many edges failed.
            VerificationError: the only edge lied. SlipError: as `step` does.
        """
        edges = self._edges
        failed: LinkError | None = None
        for _ in range(FAILURES):
            if len(edges) == 1 and len(x) <= PARTS * op.rows:
                # In place: one row's exchange has few calls, and they are counted.
                edge = edges[0]
                edge.turn.acquire()
                if edges is not self._edges:  # it may be gone
                    edge.turn.release()
                    edges = self._edges
                    continue
                edge.limit = math.inf
                edge.begun = edge.until = perf_counter()
            else:
                if len(x) > (most := PARTS * op.rows * max(1, len(edges))):
                    parts = range(0, len(x), most)
                    return np.concatenate([self.run(step, op, x[i : i + most], pads, own) for i in parts])
                chosen = self._choose(op, len(x), pads)
                if len(chosen) > 1:
                    return self._together(step, op, x, pads, own, chosen)
                edge = chosen[0][0]
            try:
                return step(op, x, pads, edge, own)
            except LinkError as error:
                failed = self._lost(edge, error)
            finally:
                edge.turn.release()
                if self._waiting:
                    self._free()
            edges = self._edges
        assert failed is not None
        raise failed

    def _together(
        self,
        step: Step,
        op: Operator,
        x: Rows,
        pads: Pool,
        own: Callable[[Rows], Rows],
        chosen: list[tuple[Edge, slice]],
    ) -> Rows:
        """Each edge in a thread of its own. What they bring is added to the rows of `own` as an exchange does it."""

        def ask(edge: Edge, part: slice) -> Rows | LinkError:
            try:
                return step(op, x[part], pads, edge, nothing)
            except LinkError as error:
                return self._lost(edge, error)
            finally:
                edge.turn.release()
                if self._waiting:
                    self._free()

        def nothing(x: Rows) -> Rows:
            return np.zeros((len(x), op.scales.shape[1]), np.float32)

        asked = [self._threads.submit(ask, edge, part) for edge, part in chosen]
        try:
            y = own(x)
        finally:
            wait(asked)
        answers = [each.result() for each in asked]
        for (_, part), theirs in zip(chosen, answers, strict=True):
            if isinstance(theirs, LinkError):
                theirs = self.run(step, op, x[part], pads, nothing)
            y[part] += theirs
        return y

    def _choose(self, op: Operator, rows: int, pads: Pool) -> list[tuple[Edge, slice]]:
        """Which edges compute which rows; their turns have begun. Raises NoWorkerError."""
        size = op.shape[0] * op.shape[1]
        with self._lock:
            while True:
                self._await_one(perf_counter() + self._patience)
                now = perf_counter()
                able = self._able(op.number, pads, now)
                idle = [edge for edge in able if not edge.turn.locked()]
                busy = [(edge.free_in(now) + edge.seconds(size, rows), edge) for edge in able if edge not in idle]
                if idle:
                    soonest = min(edge.seconds(size, rows) for edge in idle)
                    if all(seconds > SOONER * soonest for seconds, edge in busy if edge.speed.known):
                        chosen = [(edge, n) for edge, n in self._shares(idle, size, rows, now) if n]
                        if got := self._take(chosen, size, now):
                            return got
                        continue
                self._waiting += 1
                # Whoever ends a turn wakes one that waits; that one may want another edge.
                self._changed.wait(min(BEAT_SECONDS, max(1e-3, min(edge.free_in(now) for _, edge in busy))))
                self._waiting -= 1

    def _able(self, group: int, pads: Pool, now: float) -> list[Edge]:
        """Those that may be asked: of a party for which there are pads, if there is one, and not just failed."""
        able = [edge for edge in self._edges if edge.after <= now] or self._edges
        if len({edge.party for edge in able}) > 1:
            able = [edge for edge in able if pads.ready(group, edge.party)] or able
        return able

    @staticmethod
    def _shares(idle: list[Edge], size: int, rows: int, now: float) -> list[tuple[Edge, int]]:
        """How many rows each of the `idle` edges is to compute. One that is new counts as the fastest."""
        idle = sorted(idle, key=lambda edge: (edge.speed.known, edge.begun))
        best = min((edge.speed.line(size) for edge in idle if edge.speed.known), key=sum, default=(1.0, 1e-3))
        lines = [edge.speed.line(size) if edge.speed.known else best for edge in idle]
        for i, edge in enumerate(idle):
            due = max(TRY_SECONDS, TRY_TIMES * edge.seconds(size, 1)) if edge.speed.known else -math.inf
            if len(idle) > 1 and now - edge.begun > due:
                first = rows if rows <= FEW else rows // 16
                rest = shares(lines[:i] + lines[i + 1 :], rows - first)
                return [(edge, first), *zip(idle[:i] + idle[i + 1 :], rest, strict=True)]
        return list(zip(idle, shares(lines, rows), strict=True))

    @staticmethod
    def _take(chosen: list[tuple[Edge, int]], size: int, now: float) -> list[tuple[Edge, slice]]:
        """Begin their turns. Empty if one has begun meanwhile."""
        got: list[tuple[Edge, slice]] = []
        start = 0
        for edge, share in chosen:
            if not edge.take(now, edge.seconds(size, share)):
                for other, _ in got:
                    other.turn.release()
                return []
            got.append((edge, slice(start, start + share)))
            start += share
        return got

    def _free(self) -> None:
        with self._lock:
            self._changed.notify()

    def _lost(self, edge: Edge, error: LinkError) -> LinkError:
        """Drop an edge whose exchange failed, with `error`, which is returned. Raises it again if it was not the link
        that failed, or if an edge lied and there is no other one."""
        if edge.alive:
            raise error
        with self._lock:
            self._edges = [other for other in self._edges if other is not edge]
            failures = self._failed.get(edge.name, (0, 0.0))[0] + 1
            again = perf_counter() + min(AGAIN_SECONDS * 2 ** (failures - 1), FORGIVEN_SECONDS)
            self._failed[edge.name] = failures, again
            self.replaced += 1
        if isinstance(error, VerificationError):
            edge.lied()
            if not self._edges:
                raise error
        return error

    def _end_stalled(self) -> None:
        """End links whose answers are overdue, while there is another one: who waits for them asks that one."""
        while not self._closed.wait(BEAT_SECONDS):
            edges, now = self._edges, perf_counter()
            if len(edges) > 1:
                stalled = next((edge for edge in edges if now - edge.since > edge.limit), None)
                if stalled is not None:
                    stalled.close()
