"""Where an exchange's time goes: the same exchange, with a clock around each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from time import perf_counter_ns
from typing import Any

from sliplm.exchange.link import Field, Link, Own
from sliplm.exchange.operator import Operator
from sliplm.exchange.step import STEPS, Pads, Rows, Steps, exchange
from sliplm.pads.pad import Pad


class Measured:
    """`exchange`, counting nanoseconds in `spent`: of taking pads, encoding, the link and, within it, the trusted
    side's `own` part, decoding with its check. Threads may lose a count to each other now and then."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("pads", "encode", "link", "own", "decode"), 0)
        self._steps = Steps(*(self._timed(name, step) for name, step in STEPS._asdict().items()))

    def exchange(self, op: Operator, x: Rows, pads: Pads, link: Link, own: Callable[[Rows], Rows]) -> Rows:
        """See `step.exchange`."""
        own = self._timed("own", own)
        return exchange(op, x, _TimedPads(self._timed("pads", pads.take)), _TimedLink(link, self), own, self._steps)

    def _timed(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = perf_counter_ns()
            try:
                return step(*arguments)
            finally:
                self.spent[name] += perf_counter_ns() - start

        return run


class _TimedPads:
    def __init__(self, take: Callable[[int, int, str | None], Pad]) -> None:
        self.take = take


class _TimedLink(Link):
    def __init__(self, link: Link, measured: Measured) -> None:
        self.close = link.close  # type: ignore[method-assign]
        self.party = link.party
        self._measured = measured
        self._link = link
        self._exchange = measured._timed("link", link.exchange)

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        answer: tuple[Field, Own] = self._exchange(group, x, own)
        return answer

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        with closing(self._link.exchanges(group, self._apart(questions), own)) as answers:
            following = self._measured._timed("link", next)
            while (answer := following(answers, None)) is not None:
                yield answer

    def _apart(self, questions: Iterator[Field]) -> Iterator[Field]:
        """The link asks for the next question, and making that is no time of the link's."""
        while True:
            start = perf_counter_ns()
            try:
                x = next(questions, None)
            finally:
                self._measured.spent["link"] -= perf_counter_ns() - start
            if x is None:
                return
            yield x

    def close(self) -> None: ...
