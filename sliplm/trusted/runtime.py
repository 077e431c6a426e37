"""What all protected layers of one model share: their operators, the pads, and the link to an edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

from sliplm.edge.multiplier import Multiplier
from sliplm.errors import BundleError, LinkError
from sliplm.exchange.check import check
from sliplm.exchange.link import Field, InProcessLink, Link, Own, Router
from sliplm.exchange.measured import Measured
from sliplm.exchange.operator import Operator
from sliplm.exchange.step import Pads, Rows, exchange
from sliplm.pads.pairs import Pairs
from sliplm.pads.pool import Pool
from sliplm.pads.sources import SelfSource
from sliplm.prg import expand, fresh_key


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


class Runtime:
    """Runs the exchanges of a model.

    Args:
        operators: of the groups, in the order of their numbers.
        digest: names the split (32 bytes); an edge must hold the same.

    Attributes:
        pool: the one-time pads; there are none until `make_pads` or `attach` says who makes them.
        default_link: where exchanges go without `using`: nowhere, until `attach` sets it. A server sets none, so that
            an exchange that has lost its context fails.
    """

    def __init__(self, operators: Sequence[Operator], digest: bytes) -> None:
        self.operators = list(operators)
        self.digest = digest
        self.shapes = [op.shape for op in self.operators]
        self.pool = Pool(self.shapes)
        self.default_link: Link | None = None
        self.counters = Counters()
        self._step: Callable[[Operator, Rows, Pads, Link, Callable[[Rows], Rows]], Rows] = exchange
        self._link: ContextVar[Link | Router | None] = ContextVar("link", default=None)

    def __repr__(self) -> str:
        return f"Runtime(groups={len(self.operators)}, pool={self.pool!r})"

    def attach(self, edge: Path | str | SelfSource) -> None:
        """Make pads from the edge bundle DIR/edge and let this process be the edge, too: for notebooks, tests and
        `slip evaluate`. Raises BundleError if it is damaged or of another split."""
        source = edge if isinstance(edge, SelfSource) else SelfSource.open(edge, self.digest)
        self.make_pads(source)
        self.default_link = InProcessLink(Multiplier(source.matrices, self.digest))

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
        """Send the exchanges of this context (thread, request) over `link`, or over those that it chooses."""
        token = self._link.set(link)
        try:
            yield
        finally:
            self._link.reset(token)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """In this context a product is its trusted part alone: no edge is asked and no pad is used. What the model then
        says is no answer, but its code computes as it will, so that can be tried before an edge connects."""
        token = self._link.set(_NOBODY)
        try:
            yield
        finally:
            self._link.reset(token)

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
            raise LinkError("no edge is connected: serve the model, or `model.slip.attach` an edge bundle.")
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
