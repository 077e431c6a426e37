"""The tokens of one answer, on their way from whoever generates them to whoever reads them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from sliplm.engine.logprobs import Scored
from sliplm.errors import CancelledError, SlipError, VerificationError, locate
from sliplm.exchange.link import Field, Link, Own, Router, States

BEAT_SECONDS = 0.2
AHEAD = 64
"""Tokens that wait for a slow reader before the generation waits for it, too."""


class Token(NamedTuple):
    """One of an answer, with its scores if asked for; and whether it had been guessed, so that it took no pass."""

    id: int
    scored: Scored | None
    guessed: bool = False


CANCELLED = "the request was cancelled"

_log = logging.getLogger(__name__)


class Answer:
    """What the two share.

    Attributes:
        cancelled: set when nobody reads any more.
        wake: set when the reader has taken a token or has gone.
        ended: whether the model has ended the answer itself.
        rejected: how many tokens were guessed in vain.
    """

    def __init__(self) -> None:
        self.cancelled, self.wake = threading.Event(), threading.Event()
        self.ended = False
        self.rejected = 0
        self._queue: queue.SimpleQueue[Token | SlipError | None] = queue.SimpleQueue()
        self._lie: VerificationError | None = None

    @property
    def full(self) -> bool:
        """Whether so many tokens wait for the reader that the generation shall wait, too."""
        return self._queue.qsize() >= AHEAD

    def put(self, token: Token) -> None:
        """Hand a token to the reader."""
        self._queue.put(token)

    def finish(self) -> None:
        """There are no more tokens."""
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """End the answer with `error`, whatever it is, or the reader would wait for ever."""
        if not isinstance(error, SlipError):
            # Its text might quote a prompt or a weight, so neither the log nor the requester gets it.
            _log.error("the generation failed: %s", locate(error))
            error = SlipError(f"the generation failed: {locate(error)}")
        elif isinstance(error, VerificationError):
            self._lie = error  # the reader may have gone, or stop before it comes to the error
        self._queue.put(error)

    def tokens(self) -> Iterator[Token | None]:
        """The tokens; None now and then, as long as there is none. Raises what `fail`
        was given."""
        while True:
            try:
                item = self._queue.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                yield None
                continue
            self.wake.set()
            if item is None:
                return
            if isinstance(item, SlipError):
                raise item
            yield item

    def cancel(self) -> None:
        """Return when nothing is computed for this answer any more. Raises VerificationError if the edge has lied,
        whether or not `tokens` came that far."""
        self.cancelled.set()
        self.wake.set()
        self._wait()
        if self._lie is not None:
            raise self._lie

    def _wait(self) -> None:
        """Until nothing is computed for it any more."""
        raise NotImplementedError


def cancellable(link: Link | Router, unwanted: Callable[[], bool]) -> Link | Router:
    """`link`, until `unwanted()`: a long prompt is many exchanges before the first token."""
    return (_Router if isinstance(link, Router) else _Link)(link, unwanted)  # type: ignore[arg-type]


class _Router(Router):
    def __init__(self, router: Router, unwanted: Callable[[], bool]) -> None:
        self._router, self._unwanted = router, unwanted

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        def wanted(op: Any, x: Any, pads: Any, link: Link, own: Any) -> Any:
            return step(op, x, pads, _Link(link, self._unwanted), own)

        return self._router.run(wanted, *arguments)

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        if self._unwanted():
            raise CancelledError(CANCELLED)
        return self._router.compute(run, request, start, x, keep)

    def forget(self, request: int) -> None:
        self._router.forget(request)


class _Link(Link):
    def __init__(self, link: Link, unwanted: Callable[[], bool]) -> None:
        self._link, self._unwanted = link, unwanted
        self.party = link.party

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        self._check()
        return self._link.exchange(group, x, own)

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        return self._link.exchanges(group, self._while_wanted(questions), own)

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        self._check()
        return self._link.compute(run, request, start, x, keep)

    def forget(self, request: int) -> None:
        self._link.forget(request)

    def _while_wanted(self, questions: Iterator[Field]) -> Iterator[Field]:
        for x in questions:
            self._check()
            yield x

    def _check(self) -> None:
        if self._unwanted():
            raise CancelledError(CANCELLED)

    def close(self) -> None:
        self._link.close()
