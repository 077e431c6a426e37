"""What all protected layers of one model share: their operators, the pads, and the link to an edge."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from sliplm.bundle import EdgeBundle
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.open import OpenBlocks
from sliplm.errors import BundleError, LinkError, UnsupportedModelError
from sliplm.exchange.check import check
from sliplm.exchange.link import Field, InProcessLink, Link, Own, Router, States
from sliplm.exchange.measured import Measured
from sliplm.exchange.operator import Operator
from sliplm.exchange.step import Pads, Rows, exchange
from sliplm.pads.pairs import Pairs
from sliplm.pads.pool import Pool
from sliplm.pads.sources import SelfSource
from sliplm.prg import expand, fresh_key

if TYPE_CHECKING:
    from sliplm.trusted.open import OpenRun


NO_EDGE = "no edge is connected: serve the model, or `model.slip.attach` an edge bundle."

STATE_ROWS = 256
"""Hidden states in one question: a long prompt takes several, each a round trip, so that no answer takes too long."""


@dataclass(slots=True)
class Counters:
    """What a runtime has done since it was made: exchanges, rows (tokens) in them, payload bytes each way, and the
    nanoseconds that exchanges took. Threads may lose a count to each other now and then."""

    exchanges: int = 0
    rows: int = 0
    sent: int = 0
    received: int = 0
    exchange: int = 0


class _Nobody(Link):
    """Stands where a rehearsal has no edge."""

    party = None

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        raise LinkError("nobody answers in a rehearsal")

    def close(self) -> None: ...


_NOBODY = _Nobody()


class Request:
    """What an edge knows the cache of a sequence by. A copy would change what the edge has of the first one."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __deepcopy__(self, _: object) -> Request:
        raise UnsupportedModelError("a cache cannot be copied where blocks are open: the edge has its other part.")


class Runtime:
    """Runs the exchanges of a model.

    Args:
        operators: of the groups, in the order of their numbers.
        digest: names the split (32 bytes); an edge must hold the same.

    Attributes:
        pool: the one-time pads; there are none until `make_pads` or `attach` says who makes them.
        runs: how many runs of open blocks the edge computes; a request then stays with one edge, which has its cache.
        default_link: where exchanges go without `using`: nowhere, until `attach` sets it. A server sets none, so that
            an exchange that has lost its context fails.
    """

    def __init__(self, operators: Sequence[Operator], digest: bytes) -> None:
        self.operators = list(operators)
        self.digest = digest
        self.shapes = [op.shape for op in self.operators]
        self.pool = Pool(self.shapes)
        self.default_link: Link | None = None
        self.runs = 0
        self.counters = Counters()
        self._step: Callable[[Operator, Rows, Pads, Link, Callable[[Rows], Rows]], Rows] = exchange
        self._link: ContextVar[Link | Router | None] = ContextVar("link", default=None)
        self._opened: ContextVar[list[int] | None] = ContextVar("opened", default=None)

    def __repr__(self) -> str:
        return f"Runtime(groups={len(self.operators)}, pool={self.pool!r})"

    def attach(self, edge: Path | str | SelfSource) -> None:
        """Make pads from the edge bundle DIR/edge and let this process be the edge, too: for notebooks, tests and
        `slip evaluate`. Raises BundleError if it is damaged or of another split."""
        source = edge if isinstance(edge, SelfSource) else SelfSource.open(edge, self.digest)
        self.make_pads(source)
        blocks = None if isinstance(edge, SelfSource) or not self.runs else OpenBlocks.load(EdgeBundle.open(edge))
        self.default_link = InProcessLink(Multiplier(source.matrices, self.digest), blocks)

    def open_runs(self, runs: Sequence[OpenRun]) -> None:
        """Let the edge compute these."""
        self.runs = len(runs)
        for run in runs:
            run.bind(self)

    def make_pads(self, source: SelfSource) -> None:
        """Make pads here, from `source`, from now on. A wrong matrix would show at the first exchange, but better now:
        the first image of each group is checked. Raises BundleError."""
        for op in self.operators:
            key = fresh_key()
            if not check(op, expand(key, 0, 1, op.shape[1]), source.image(op.number, key, 1, 0)):
                raise BundleError(f"group {op.number} of the edge bundle is not what the trusted one was split with.")
        self.pool.own = source

    def take_helpers(self, each: int = 1) -> Pool | Pairs:
        """Take pads from helpers from now on, `each` being made by one or by two; what they are to work for."""
        self.pool.expected = each
        if each == 1:
            return self.pool
        return Pairs(self.pool, self.shapes, lambda group, r, image: check(self.operators[group], r, image))

    @contextmanager
    def using(self, link: Link | Router) -> Iterator[None]:
        """Send the exchanges of this context (thread, request) over `link`, or over those that it chooses. What open
        blocks keep of its requests goes with it."""
        token, opened = self._link.set(link), self._opened.set([])
        try:
            yield
        finally:
            for request in self._opened.get() or ():
                link.forget(request)
            self._opened.reset(opened)
            self._link.reset(token)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """In this context a product is its trusted part alone, and open blocks let hidden states through: no edge is
        asked and no pad is used. What the model then says is no answer, but its code computes as it will, so that can
        be tried before an edge connects."""
        token = self._link.set(_NOBODY)
        try:
            yield
        finally:
            self._link.reset(token)

    @property
    def is_rehearsing(self) -> bool:
        return self._link.get() is _NOBODY

    def new_request(self) -> Request:
        """What an edge will know a sequence's cache by; it may forget it with the context, or with what is returned."""
        request = Request(secrets.randbits(64))
        if (opened := self._opened.get()) is not None:
            opened.append(request.number)
        elif self.default_link is not None:
            weakref.finalize(request, self.default_link.forget, request.number)
        return request

    def compute(self, run: int, request: Request, start: int, x: States, keep: bool) -> States:
        """Hidden states x (T, H) of the positions from `start` on, after the open blocks of `run`: see `Link.compute`.

        Raises LinkError. NumericsError: the edge's answer is not finite.
        """
        link = self._link.get() or self.default_link
        if link is None:
            raise LinkError(NO_EDGE)
        begin = perf_counter_ns()
        parts = [
            link.compute(run, request.number, start + i, x[i : i + STATE_ROWS], keep or i + STATE_ROWS < len(x))
            for i in range(0, len(x), STATE_ROWS)
        ]
        counters = self.counters
        counters.exchange += perf_counter_ns() - begin
        counters.exchanges += len(parts)
        counters.rows += len(x)
        counters.sent += x.nbytes
        counters.received += x.nbytes
        return np.concatenate(parts)

    def measure(self) -> dict[str, int]:
        """From now on, count the nanoseconds of an exchange's steps, too: `Measured.spent`, which is returned."""
        measured = Measured()
        self._step = measured.exchange
        return measured.spent

    def product(self, op: Operator, x: Rows, own: Callable[[Rows], Rows]) -> Rows:
        """A group's output: x (T, K) float32 to (T, N) float32, `own` giving the trusted part of some rows of x.

        Raises:
            LinkError: no edge, or it went away. VerificationError: its answer is wrong; nothing is returned.
            NumericsError: x is not finite.
        """
        link = self._link.get() or self.default_link
        if link is None:
            raise LinkError(NO_EDGE)
        if link is _NOBODY:
            return own(x)
        start = perf_counter_ns()
        if not len(x):
            y = own(x)
        elif isinstance(link, Router):
            y = link.run(self._step, op, x, self.pool, own)
        else:
            y = self._step(op, x, self.pool, link, own)
        counters = self.counters
        counters.exchange += perf_counter_ns() - start
        counters.exchanges += -(-len(x) // op.rows)
        counters.rows += len(x)
        counters.sent += 4 * len(x) * op.shape[1]
        counters.received += 4 * len(x) * op.shape[0]
        return y
