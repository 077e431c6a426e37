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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from sliplm.errors import LinkError, NoWorkerError, VerificationError
from sliplm.exchange.edge import Edge, Picked
from sliplm.exchange.link import PARTS, Link, Router
from sliplm.exchange.shares import NEW, ROWS, SIZE, Line, shares

if TYPE_CHECKING:
    from sliplm.exchange.operator import Operator
    from sliplm.exchange.step import Rows
    from sliplm.pads.pool import Pool

    Step = Callable[[Operator, Rows, Pool, Link, Callable[[Rows], Rows]], Rows]

TRY_SECONDS, TRY_TIMES = 0.5, 50
"""An idle edge is tried so long after its last exchange, and so many times as long as one row takes it: a slow one
costs little."""

FEW = 4
"""An edge that is tried, or new, gets so many rows whole, and of more a sixteenth."""

SOONER = 0.8
"""A busy edge is waited for if the rows are done there in so much of the time that an idle one takes."""

BEAT_SECONDS, WAIT_SECONDS = 0.25, 0.02
"""Between two looks for stalled edges; and, of who waits for a busy edge, at those that there are."""

AGAIN_SECONDS, FORGIVEN_SECONDS = 1.0, 600.0
"""An edge whose link failed, and that comes back, is asked so long after the failure, twice as long after each further
one; earlier only if there is no other. So it cannot hold up an exchange each time that it connects."""

DOUBLINGS = 10
"""The delay grows no more after so many."""

LATE_TIMES, LATE_FORGIVEN_SECONDS = 4, 10.0
"""An answer that took LATE_SECONDS and so many times as long as expected was late: its edge is asked again after twice
that time, after the next one four times, and so on, if there is another. One is forgotten after so long. What is
learned of an edge's speed would not do: it could make up for every late answer with a few quick ones."""

FAILURES = 16
"""After so many in one exchange it is given up."""

UNRELIABLE = "the edges that were asked failed, one after the other: try again later"
NO_EDGE = "no edge is connected: start `slip edge`, or try again soon"
NO_EDGE_OF_ITS_OWN = "this device has no edge connected: start `slip edge` on it, or try again soon"


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
        self._mixed = False  # whether they are of several parties
        self._again = 0.0  # when all may be asked
        self._failed: dict[str, tuple[int, float]] = {}  # how often the links of a name did, and when it may come back
        self._late: dict[
            str, tuple[float, float, float]
        ] = {}  # its late answers, at what time, and when it may be asked
        self._lost_at = -math.inf  # when an edge failed last
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
            again = max(again, self._late.get(name, (0.0, 0.0, 0.0))[2])
            self._set([*self._edges, Edge(link, name, lied, self.rows, again, self._took_long)])
            if len(self._edges) > 1 and self._watch is None and not self._closed.is_set():
                self._watch = threading.Thread(target=self._end_stalled, name="edges", daemon=True)
                self._watch.start()
            self._changed.notify_all()

    def remove(self, link: Link) -> None:
        """Ask it no more. Its exchange under way goes on."""
        with self._lock:
            self._set([edge for edge in self._edges if edge.link is not link])

    def _set(self, edges: list[Edge]) -> None:
        self._edges = edges
        self._mixed = len({edge.party for edge in edges}) > 1
        self._again = max((edge.after for edge in edges), default=0.0)

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

    def pick(self, name: str) -> Picked:
        """The newest edge of this name that is alive, and no other: for a model that keeps and shows an edge something
        of a request. Raises NoWorkerError if there is none in time."""
        deadline = perf_counter() + self._patience
        with self._lock:
            while True:
                mine = [edge for edge in self._edges if edge.name == name and edge.alive]
                if mine:
                    return Picked(mine[-1].link, partial(self._lost, mine[-1]))
                if (left := deadline - perf_counter()) <= 0 or self._closed.is_set():
                    raise NoWorkerError(NO_EDGE_OF_ITS_OWN)
                self._changed.wait(left)

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
                # It may be gone. That others came or went is no reason: they could do so each time.
                if edges is not self._edges and edge not in self._edges:
                    edge.turn.release()
                    edges = self._edges
                    continue
                edge.begun = edge.until = perf_counter()
                edge.asked = op.shape[0] * op.shape[1], len(x)
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
        if isinstance(failed, VerificationError):
            raise failed
        raise LinkError(UNRELIABLE)  # what they said of it may be meant for whoever reads it: it is not told

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

        asked = [self._hand_out(partial(ask, edge, part)) for edge, part in chosen]
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

    def _hand_out(self, ask: Callable[[], Rows | LinkError]) -> Future[Rows | LinkError]:
        """`ask` in another thread; here, if the system has no more: it holds a turn, which it has to end."""
        free = threading.Lock()
        here: Future[Rows | LinkError] = Future()

        def once() -> Rows | LinkError:
            # A thread that ends later may still find it in its queue.
            return ask() if free.acquire(blocking=False) else LinkError("this has been asked")

        try:
            return self._threads.submit(once)
        except RuntimeError:
            try:
                here.set_result(once())
            except BaseException as error:
                here.set_exception(error)
            return here

    def _choose(self, op: Operator, rows: int, pads: Pool) -> list[tuple[Edge, slice]]:
        """Which edges compute which rows; their turns have begun. Raises NoWorkerError."""
        if chosen := self._try(op, rows, pads):
            return chosen
        with self._lock:
            self._waiting += 1  # whoever ends a turn from now on says so
            try:
                while True:
                    self._await_one(perf_counter() + self._patience)
                    if chosen := self._try(op, rows, pads):
                        return chosen
                    self._changed.wait(WAIT_SECONDS)
            finally:
                self._waiting -= 1

    def _try(self, op: Operator, rows: int, pads: Pool) -> list[tuple[Edge, slice]]:
        """The same; empty if it is better to wait. Written in place: for one row, calls would take longer than the
        choice."""
        now, size = perf_counter(), op.shape[0] * op.shape[1]
        units = size / SIZE
        edges = self._edges
        if self._again > now:
            edges = [edge for edge in edges if edge.after <= now] or edges
        if self._mixed:
            edges = [edge for edge in edges if pads.ready(op.number, edge.party)] or edges
        idle: list[Edge] = []
        lines: list[Line] = []
        best: Edge | None = None
        tried: Edge | None = None
        least = sooner = math.inf
        for edge in edges:
            speed = edge.speed
            a, b = speed.latency + units * speed.reading, max(1e-9, units * speed.each / ROWS)
            seconds = a + b * rows
            if edge.turn.locked():
                left = edge.until - now  # one that is late takes as long again as it has taken
                if speed.count >= NEW:
                    sooner = min(sooner, seconds + (left if left > 0 else now - edge.begun))
                continue
            due = speed.count < NEW or now - edge.begun > max(TRY_SECONDS, TRY_TIMES * (a + b))
            if due and (tried is None or edge.begun < tried.begun):
                tried = edge
            if speed.count >= NEW:
                idle.append(edge)
                lines.append((a, b))
                if seconds < least:
                    least, best = seconds, edge
        if tried is not None:
            first = rows if rows <= FEW or idle in ([], [tried]) else max(1, rows // 16)
            chosen = [(tried, first)]
            if first < rows:
                others = [(edge, line) for edge, line in zip(idle, lines, strict=True) if edge is not tried]
                parts = shares([line for _, line in others], rows - first)
                chosen += [(edge, part) for (edge, _), part in zip(others, parts, strict=True) if part]
        elif best is None or sooner <= SOONER * least:
            return []
        elif rows == 1:
            chosen = [(best, 1)]
        else:
            chosen = [(edge, part) for edge, part in zip(idle, shares(lines, rows), strict=True) if part]
        taken: list[tuple[Edge, slice]] = []
        start = 0
        for edge, part in chosen:
            if not edge.turn.acquire(blocking=False):
                for other, _ in taken:
                    other.turn.release()
                return []
            edge.begun, edge.asked = now, (size, part)
            edge.until = now + edge.seconds(size, part)
            taken.append((edge, slice(start, start + part)))
            start += part
        return taken

    def _free(self) -> None:
        with self._lock:
            self._changed.notify()

    def _lost(self, edge: Edge, error: LinkError) -> LinkError:
        """Drop an edge whose exchange failed, with `error`, which is returned. Raises it again if it was not the link
        that failed, or if an edge lied and there is no other, nor was a moment ago."""
        if edge.alive:
            raise error
        with self._lock:
            failures = self._failed.get(edge.name, (0, 0.0))[0] + 1
            again = perf_counter() + min(AGAIN_SECONDS * 2 ** min(failures - 1, DOUBLINGS), FORGIVEN_SECONDS)
            self._failed[edge.name] = failures, again
            self.replaced += 1
            rest = [other for other in self._edges if other is not edge]
            for other in rest:
                if other.name == edge.name:  # what is wrong with one link of a device may be with all
                    other.after = again
            self._set(rest)
            lately = perf_counter() - self._lost_at < self._patience
            self._lost_at = perf_counter()
        if isinstance(error, VerificationError):
            edge.lied()
            if not self._edges and not lately:
                raise error
        return error

    def _took_long(self, edge: Edge, size: int, rows: int, seconds: float) -> None:
        """Ask the device of `edge` less often for a while if it was late: by what is known of it, or, of one that is
        new, by what the fastest of the others would have taken."""
        with self._lock:
            others = [other.seconds(size, rows) for other in self._edges if other is not edge and other.speed.known]
            expected = edge.seconds(size, rows) if edge.speed.known else min(others, default=0.0)
            if not others or seconds < LATE_TIMES * expected:
                return
            now = perf_counter()
            times, at, _ = self._late.get(edge.name, (0.0, now, 0.0))
            times = min(max(0.0, times - (now - at) / LATE_FORGIVEN_SECONDS) + 1, DOUBLINGS)
            again = now + min(seconds * 2**times, FORGIVEN_SECONDS)
            self._late[edge.name] = times, now, again
            for other in self._edges:
                if other.name == edge.name:
                    other.after = max(other.after, again)
            self._set(self._edges)

    def _end_stalled(self) -> None:
        """End links whose answers are overdue, while there is another one: who waits for them asks that one."""
        while not self._closed.wait(BEAT_SECONDS):
            edges, now = self._edges, perf_counter()
            stalled = [edge for edge in edges if edge.stalled(now)]
            for edge in stalled[: len(edges) - 1]:
                edge.close()
