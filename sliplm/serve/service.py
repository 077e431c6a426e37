"""One request from end to end: the owner's rules, limits, metering, a fair turn, the engine.

The server (`server.py`) knows connections, the engine knows the model; this is what lies between them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from typing import Protocol

import msgspec

from sliplm.engine.calls import Calls, find_calls
from sliplm.engine.tools import Syntax
from sliplm.errors import BusyError, LinkError, SlipError
from sliplm.exchange.edges import Edges
from sliplm.exchange.link import Link, Router
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.registry import Device, Limits, Registry
from sliplm.serve.fair import RETRY_SECONDS, FairQueue
from sliplm.serve.limits import DEFAULTS, Limiter
from sliplm.serve.meter import Meter, Record
from sliplm.serve.metrics import Metrics
from sliplm.serve.rules import Rules, review_answer, review_request

QUEUE_SECONDS = 60.0

SLOT_SECONDS = 30.0
SLOT_SECONDS_PER_TOKEN = 2.0
SLOT_SECONDS_PER_PROMPT_TOKEN = 0.1
"""So long, and so much longer for every token of its answer and of its prompt, a request keeps its slot whoever waits.
Edges and requesters that are slower, on purpose or not, keep theirs while no other device needs it."""

BEAT_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What generates text. Called from many threads, for at most `capacity` requests at a time."""

    @property
    def capacity(self) -> int: ...

    @property
    def shows(self) -> bool:
        """Whether an edge keeps and sees something of a request, which then is for the device's own edge alone."""
        ...

    @property
    def syntax(self) -> Syntax:
        """How the model writes calls of tools. Raises RequestError if it knows none. Asked for requests with tools."""
        ...

    def generate(self, request: GenerateRequest, link: Link | Router) -> Iterator[Chunk]:
        """Text, from exchanges over `link`: the same pool of edges for all requests. Closing the iterator cancels. The
        last chunk, and only it, has a `finish_reason`; all have the counts of tokens so far. An iteration without text
        yields an empty chunk now and then, so that cancelling works.

        Raises RequestError or BusyError, whose sentence the requester sees; any other SlipError ends the request
        with a sentence that names no cause. Text must have been verified when it is yielded.
        """
        ...

    def model_name(self) -> str:
        """The model's public name; edges see it."""
        ...


class Service:
    """Answers requests with `engine`. `start` and `close` belong around its use."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        limits: Limits = DEFAULTS,
        rules: Rules | None = None,
        metrics: Metrics | None = None,
        queue_seconds: float = QUEUE_SECONDS,
    ) -> None:
        self.metrics = metrics or Metrics()
        self.queue = FairQueue(engine.capacity)
        self.meter = Meter(registry.usage)
        self._engine = engine
        self._limiter = Limiter(limits)
        self._rules = rules
        self._queue_seconds = queue_seconds

    def answer(self, request: GenerateRequest, device: Device, edges: Edges) -> Generator[Chunk, None, None]:
        """The answer to what `device` asks, computed on any of `edges`; close it to cancel. While the request waits, an
        empty chunk comes every half second.

        Raises:
            RequestError, RefusedError: the request is wrong, or the owner's rules refuse it.
            LimitError, BusyError: not now.
            IdentityError: the device may not connect any more.
            NoWorkerError: there is no edge. SlipError: as the engine does, and for rules that fail.
        """
        started = time.monotonic()
        outcome = SlipError.outcome
        record: Record | None = None
        with self.metrics.in_progress.track_inprogress():
            try:
                request = review_request(self._rules, request, device.name)
                self._limiter.admit(device)
                edges.wait()  # without a worker there is nothing to wait for
                record, used = self.meter.begin(device)
                self._limiter.recall(device, used)
                self._limiter.admit(device)
                with (
                    contextlib.closing(self._metered(request, device, edges, record, started)) as chunks,
                    contextlib.closing(review_answer(self._rules, chunks, request, device.name)) as reviewed,
                ):
                    if request.tools:  # the rules have seen them as the model wrote them
                        names = {tool.name for tool in request.tools}
                        reviewed = find_calls(reviewed, Calls(self._engine.syntax, names, request.parallel_calls))
                    for chunk in reviewed:
                        if chunk.finish_reason is not None:
                            outcome = chunk.finish_reason
                        yield chunk
            except BaseException as error:
                outcome = _outcome(error)
                raise
            finally:
                if record is not None:
                    self.meter.finish(record, outcome)
                self._account(device, record, outcome, time.monotonic() - started)

    def _metered(
        self, request: GenerateRequest, device: Device, edges: Edges, record: Record, started: float
    ) -> Generator[Chunk, None, None]:
        with self.queue.join(device.fingerprint, self._limiter.concurrent(device)) as ticket:
            deadline = started + self._queue_seconds
            while not ticket.wait(BEAT_SECONDS):
                if time.monotonic() > deadline:
                    raise BusyError("the trusted side is busy with other requests: try again later", RETRY_SECONDS)
                yield Chunk("")
            self.metrics.wait.labels("slot").observe(time.monotonic() - started)
            granted = time.monotonic()
            accepted = rejected = 0
            self._limiter.admit(device)  # others of this device have used tokens while this one waited
            chunks = self._engine.generate(request, edges.pick(device.name) if self._engine.shows else edges)
            try:
                for chunk in chunks:
                    self.meter.check()
                    allowed = SLOT_SECONDS + SLOT_SECONDS_PER_TOKEN * chunk.completion_tokens
                    ticket.due = granted + allowed + SLOT_SECONDS_PER_PROMPT_TOKEN * chunk.prompt_tokens
                    if self.queue.wants_back(ticket):
                        raise LinkError("this request was too slow while another device waited: try again later")
                    prompt = chunk.prompt_tokens - record.prompt_tokens
                    completion = chunk.completion_tokens - record.completion_tokens
                    self.metrics.count(prompt, completion)
                    self.metrics.count_drafts(chunk.accepted_tokens - accepted, chunk.rejected_tokens - rejected)
                    accepted, rejected = chunk.accepted_tokens, chunk.rejected_tokens
                    fresh = prompt + completion
                    if chunk.completion_tokens and not record.completion_tokens:
                        self.metrics.wait.labels("first_token").observe(time.monotonic() - started)
                    record.prompt_tokens, record.completion_tokens = chunk.prompt_tokens, chunk.completion_tokens
                    if fresh and not self._limiter.charge(device, fresh) and chunk.finish_reason is None:
                        yield msgspec.structs.replace(chunk, finish_reason="length")
                        return
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
                raise RuntimeError("the engine stopped without a finish reason")
            finally:
                close = getattr(chunks, "close", None)
                if close is not None:
                    close()

    def _account(self, device: Device, record: Record | None, outcome: str, seconds: float) -> None:
        prompt, completion = record.tokens[1:] if record else (0, 0)
        self.metrics.request(outcome, seconds)
        what = {"device": device.name, "outcome": outcome, "prompt_tokens": prompt, "completion_tokens": completion,
                "seconds": round(seconds, 3), "request": record.request if record else None}  # fmt: skip
        _log.info("device %s: request %s, %d + %d tokens", device.name, outcome, prompt, completion, extra=what)


def _outcome(error: BaseException) -> str:
    if isinstance(error, SlipError):
        return error.outcome
    return "cancelled" if isinstance(error, GeneratorExit) else SlipError.outcome
