"""A link carries one exchange: masked rows go to the edge, their product with a group's matrix comes back.

A link knows nothing of masks and checks; to it the numbers are opaque. It promises that the answer has the
right shape and belongs to this question, and that after any failure it never answers again.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sliplm.errors import LinkError

Field = NDArray[np.uint32]
Shape = tuple[int, int]
"""A group's matrix: (M, K), rows and columns."""
Own = TypeVar("Own")
States = NDArray[Any]
"""Hidden states of one sequence, (T, H): float32, or bfloat16 as uint16."""


PARTS = 8
"""So many parts of a long input hold a link; then others, who wait for theirs, may have it."""


class Products(Protocol):
    """What multiplies: an edge's `Multiplier`."""

    def product(self, group: int, x: Field) -> Field: ...


class Blocks(Protocol):
    """What computes open blocks: an edge's `OpenBlocks`."""

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States: ...

    def forget(self, request: int) -> None: ...


class Link(abc.ABC):
    """The trusted side's way to one edge. Safe to call from several threads.

    `party` is who controls that edge and may know what it sees; None for one inside this process.
    """

    party: str | None

    @property
    def alive(self) -> bool:
        """False once it has failed or was closed."""
        return True

    @abc.abstractmethod
    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        """`Q x mod p` for every row of `x`: (T, K) uint32 to a fresh (T, M) uint32, with Q the matrix of
        `group`; and what `own` returned, which is called exactly once, while the edge computes.

        Raises LinkError if the edge is gone or too slow, ProtocolError if it misbehaves. The answer is *not*
        verified here.
        """

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        """The same for many inputs of one group: their answers, in order. Several may be under way at once; `own` is
        called once, after the first was sent.

        What `questions` raises comes after the answers to the questions before it, and leaves the link as it is.
        Whoever stops early must close the generator, which ends a link that has questions under way.
        """
        for x in questions:
            yield self.exchange(group, x, own)[0]
            own = _nothing

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        """The hidden states `x` of the positions from `start` on, after the open blocks of `run`. The edge keeps what
        it has of `request` until `forget`, or, without `keep`, until it has answered.

        Raises LinkError as `exchange` does; BusyError, which leaves the link as it is, if the edge has no room, or has
        given up what it had of this request. The answer *cannot* be verified.
        """
        raise LinkError("this edge computes no open blocks.")

    def forget(self, request: int) -> None:
        """Let the edge forget `request`. Of a link that has failed, it has forgotten all: this raises nothing."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """End the link; a running exchange fails. May be called twice, and from any thread."""


def _nothing() -> None: ...


class Router:
    """Chooses the link of every exchange; stands where a link does (`Runtime.using`)."""

    def run(self, step: Callable[..., Any], op: Any, x: Any, pads: Any, own: Callable[[Any], Any]) -> Any:
        """What `step`, an exchange over one link (`step.exchange`), returns with a link that this chooses."""
        raise NotImplementedError

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        """As `Link.compute`, if one link is chosen for good: the edge behind it keeps what is computed."""
        raise NotImplementedError

    def forget(self, request: int) -> None:
        """See Link."""


class InProcessLink(Link):
    """An edge in this very process: tests, notebooks, `slip evaluate`."""

    party = None

    def __init__(self, products: Products, blocks: Blocks | None = None) -> None:
        self._products = products
        self._blocks = blocks
        self._closed = False

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        if self._closed:
            raise LinkError("the link is closed")
        mine = own()
        return self._products.product(group, x), mine

    @property
    def alive(self) -> bool:
        return not self._closed

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        if self._blocks is None:
            return super().compute(run, request, start, x, keep)
        return self._blocks.compute(run, request, start, x, keep)

    def forget(self, request: int) -> None:
        if self._blocks is not None:
            self._blocks.forget(request)

    def close(self) -> None:
        self._closed = True
