"""What all protected layers of one model share: the pads, the secrets of the check, and the link to an edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from sliplm import field
from sliplm.errors import LinkError, VerificationError
from sliplm.exchange import masking
from sliplm.exchange.link import Link
from sliplm.kernels import IntMatrix
from sliplm.pads.pool import Pad, Pool
from sliplm.pads.prg import Stream
from sliplm.split.blinding import Blinding

CHECKS = 2  # independent Freivalds checks per token and exchange; each misses an error with probability 1/p
_CHUNK_BYTES = 64 << 20
_CHUNK_TOKENS = 512


@dataclass(slots=True)
class Counters:
    """What a runtime has done since it was made: exchanges, rows (tokens) in them, payload bytes each way, and the
    nanoseconds spent on each stage; `exchange` is from handing a question to the link until its answer is there, `own`
    the part of it in which the trusted side did its low-rank products. Threads may lose a count to each other now and
    then."""

    exchanges: int = 0
    rows: int = 0
    sent: int = 0
    received: int = 0
    pads: int = 0
    encode: int = 0
    exchange: int = 0
    own: int = 0
    verify: int = 0
    decode: int = 0


class Runtime:
    """Runs exchanges: takes pads, masks, sends, verifies, unmasks (`exchange.masking`).

    Args:
        matrices: Q of each group, from which pads are made.
        raw: the same as int8 arrays (M, K), from which the check's secrets are derived once.
        digest: names the split (32 bytes); an edge must hold the same.
        link: where exchanges go by default; `using` overrides it for the current context (thread, request).
        pool_depth: pads to keep ready per group once `pool.start()` is called.
    """

    def __init__(
        self,
        matrices: Sequence[IntMatrix],
        raw: Sequence[NDArray[np.int8]],
        digest: bytes,
        link: Link | None = None,
        pool_depth: int = 64,
    ) -> None:
        self.digest = digest
        stream = Stream()
        self._u = [stream.elements(CHECKS, m.rows) for m in matrices]
        self._uq = [field.project(u, q) for u, q in zip(self._u, raw, strict=True)]
        self.pool = Pool(matrices, pool_depth)
        self.default_link = link
        self.counters = Counters()
        self._link: ContextVar[Link | None] = ContextVar("link", default=None)
        self.shapes = [(m.rows, m.cols) for m in matrices]

    def __repr__(self) -> str:
        return f"Runtime(groups={len(self._u)}, pool={self.pool!r})"

    @contextmanager
    def using(self, link: Link) -> Iterator[None]:
        """Send the exchanges of this context over `link`."""
        token = self._link.set(link)
        try:
            yield
        finally:
            self._link.reset(token)

    def chunk(self, group: int) -> int:
        """Tokens per exchange: bounded, so that neither frames nor buffers grow with the prompt."""
        return max(1, min(_CHUNK_TOKENS, _CHUNK_BYTES // (4 * max(self._u[group].shape[1], self._uq[group].shape[1]))))

    def product(
        self,
        group: int,
        x: NDArray[np.float32],
        row_norm: float,
        scales: NDArray[np.float32],
        blindings: tuple[Blinding | None, Blinding | None],
        own: Callable[[], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """A group's output: x (T, K) float32 to (T, N) float32. The edge's part is exchanged, verified, decoded, and
        added to the trusted part, (T, N), which `own` computes while the edge is busy.

        Raises:
            LinkError: no edge, or it went away. VerificationError: its answer is wrong; nothing is returned.
            NumericsError: x is not finite.
        """
        link = self._link.get() or self.default_link
        if link is None:
            raise LinkError("no edge is connected.")
        if not len(x):
            return own()
        out: list[NDArray[np.float32]] = []
        counters = self.counters

        def meanwhile() -> None:
            start = perf_counter_ns()
            out.append(own())
            counters.own += perf_counter_ns() - start

        step = self.chunk(group)
        for i in range(0, len(x), step):
            part = x[i : i + step]
            begin = perf_counter_ns()
            pad: Pad = self.pool.take(group, len(part))
            taken = perf_counter_ns()
            masked, inv_c = masking.encode(part, pad.mask(), row_norm, blindings[0])
            encoded = perf_counter_ns()
            answer = link.exchange(group, masked, None if out else meanwhile)
            answered = perf_counter_ns()
            if not out:  # a link may leave it to us
                meanwhile()
            verifying = perf_counter_ns()
            if not masking.verify(self._u[group], self._uq[group], masked, answer):
                link.close()
                raise VerificationError("the edge gave a wrong answer; it was caught and discarded.")
            verified = perf_counter_ns()
            masking.decode(answer, pad.image, scales, inv_c, blindings[1], out[0][i : i + step])
            counters.exchanges += 1
            counters.rows += len(part)
            counters.sent += masked.nbytes
            counters.received += answer.nbytes
            counters.pads += taken - begin
            counters.encode += encoded - taken
            counters.exchange += answered - encoded
            counters.verify += verified - verifying
            counters.decode += perf_counter_ns() - verified
        return out[0]
