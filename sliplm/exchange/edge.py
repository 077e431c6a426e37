"""One edge of several: its link, with a clock that says how fast it is, and whether its answer is overdue."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from time import perf_counter
from typing import Any

from sliplm.errors import LinkError
from sliplm.exchange.link import Field, Link, Own, Router, States
from sliplm.exchange.shares import Speed

STALL_SECONDS, STALL_TIMES, STALL_NEW_SECONDS = 1.0, 8, 5.0
"""An answer that takes longer, and so many times as long as expected, is waited for no more if there is another edge;
the last is for edges of which nothing is known yet."""


LATE_SECONDS = 0.1
"""An answer that takes longer may be late: the pool knows what was to be expected."""


class Edge(Link):
    """One edge of a pool: its link with a clock. `turn` is held by whoever exchanges over it; `took_long` is told of
    answers that may be late: this, the group's size, rows, seconds."""

    def __init__(
        self,
        link: Link,
        name: str,
        lied: Callable[[], object],
        rows: Counter[str],
        after: float,
        took_long: Callable[[Edge, int, int, float], None],
    ) -> None:
        self.link, self.name, self.lied = link, name, lied
        self.after = after  # it is asked from then on, or if there is no other
        self.party = link.party
        self.turn = threading.Lock()
        self.speed = Speed()
        self.since = math.inf  # when the question was sent whose answer is waited for
        self.begun = self.until = 0.0  # of the last turn: when it began, and was to end
        self.asked = 0, 0  # what for: the group's size, and rows
        self._rows, self._took_long = rows, took_long

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
        size, seconds = x.shape[1] * answer[0].shape[1], perf_counter() - begin
        if seconds > LATE_SECONDS:
            self._took_long(self, size, len(x), seconds)
        self.speed.learn(size, len(x), seconds)
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
            size, seconds = size * width, perf_counter() - begin
            if seconds > LATE_SECONDS:
                self._took_long(self, size, rows, seconds)
            self.speed.learn(size, rows, seconds)

    def close(self) -> None:
        self.link.close()

    def seconds(self, size: int, rows: int) -> float:
        """What an exchange is expected to take."""
        a, b = self.speed.line(size)
        return a + b * rows

    def stalled(self, now: float) -> bool:
        """Whether an answer is overdue."""
        if not self.speed.known:
            return now - self.since > STALL_NEW_SECONDS
        return now - self.since > max(STALL_SECONDS, STALL_TIMES * self.seconds(*self.asked))


class Picked(Router):
    """One edge for all of a request, because it keeps something of it from one exchange to the next. `lost` is told of
    its failures, and returns or raises what to raise."""

    def __init__(self, link: Link, lost: Callable[[LinkError], LinkError]) -> None:
        self.link = link
        self._lost = lost

    def run(self, step: Callable[..., Any], op: Any, x: Any, pads: Any, own: Callable[[Any], Any]) -> Any:
        try:
            return step(op, x, pads, self.link, own)
        except LinkError as error:
            raise self._lost(error) from None

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        try:
            return self.link.compute(run, request, start, x, keep)
        except LinkError as error:
            raise self._lost(error) from None

    def forget(self, request: int) -> None:
        self.link.forget(request)
