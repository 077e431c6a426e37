"""One exchange, as in the paper (arXiv 2407.10886, section 4; docs/security.md, "The theorem for one exchange"):
encode, mask, let the edge multiply, unmask, check, decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sliplm.errors import SlipError, VerificationError
from sliplm.exchange import masking
from sliplm.exchange.check import check
from sliplm.exchange.link import PARTS, Link
from sliplm.exchange.operator import Operator
from sliplm.pads.pad import Pad

Rows = NDArray[np.float32]


class Pads(Protocol):
    """Where one-time pads come from: a pool."""

    def take(self, group: int, tokens: int, edge: str | None) -> Pad: ...


class Steps(NamedTuple):
    """The arithmetic of the trusted side, for whoever wants to wrap it: to measure, above all."""

    encode: Callable[..., tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.uint32]]] = masking.encode
    decode: Callable[..., bool] = masking.decode


STEPS = Steps()


def exchange(op: Operator, x: Rows, pads: Pads, link: Link, own: Callable[[Rows], Rows], steps: Steps = STEPS) -> Rows:
    """A group's output for x (T, K), float32: W_edge x by the edge, plus `own(x)` (T, N), the trusted part, which is
    computed while the edge is busy. More than `op.rows` rows travel in parts, several of them at once.

    Decoding also checks the unmasked product. If that is wrong, somebody lied: the edge, whose answer then is not Q
    times its question, or else who made the pad. An edge's lie ends the exchange; after a maker's, who is not asked any
    more, it is done again with a fresh pad.

    Raises:
        LinkError: the edge went away, or there are no pads. VerificationError: its answer is wrong; nothing that was
        computed from it is returned, and the link is closed.
        NumericsError: x is not finite. SlipError: the check failed, and neither edge nor maker lied.
    """
    try:
        if len(x) > (most := PARTS * op.rows):
            return np.concatenate(
                [exchange(op, x[i : i + most], pads, link, own, steps) for i in range(0, len(x), most)]
            )
        if len(x) > op.rows:
            return _in_parts(op, x, pads, link, own, steps)
        while True:
            pad = pads.take(op.number, len(x), link.party)
            masked, inv_c, expected = steps.encode(op, x, pad.mask())
            answer, y = link.exchange(op.number, masked, partial(own, x))
            if steps.decode(op, answer, pad.image, inv_c, expected, y):
                return y
            _find_liar(op, masked, answer, pad)
    except VerificationError:
        link.close()
        raise


def _in_parts(op: Operator, x: Rows, pads: Pads, link: Link, own: Callable[[Rows], Rows], steps: Steps) -> Rows:
    asked: deque[tuple[slice, Pad, NDArray[np.uint32], NDArray[np.float64], NDArray[np.uint32]]] = deque()
    ours: list[Rows] = []
    again = []

    def questions() -> Iterator[NDArray[np.uint32]]:
        for start in range(0, len(x), op.rows):
            part = slice(start, start + op.rows)
            pad = pads.take(op.number, len(x[part]), link.party)
            masked, inv_c, expected = steps.encode(op, x[part], pad.mask())
            asked.append((part, pad, masked, inv_c, expected))
            yield masked

    with closing(link.exchanges(op.number, questions(), lambda: ours.append(own(x)))) as answers:
        for answer in answers:
            part, pad, masked, inv_c, expected = asked.popleft()
            if not steps.decode(op, answer, pad.image, inv_c, expected, ours[0][part]):
                _find_liar(op, masked, answer, pad)
                again.append(part)
    (y,) = ours
    for part in again:  # decoding has spoiled them
        y[part] = exchange(op, x[part], pads, link, own, steps)
    return y


def _find_liar(op: Operator, masked: NDArray[np.uint32], answer: NDArray[np.uint32], pad: Pad) -> None:
    """Reject the pad's maker. Raises VerificationError if the edge lied, SlipError if nobody did."""
    if not check(op, masked, answer):
        raise VerificationError("the edge gave a wrong answer; it was caught and discarded.")
    if not pad.blame(partial(check, op)):
        raise SlipError("an exchange failed its check and nobody lied: this machine computes wrongly.")
