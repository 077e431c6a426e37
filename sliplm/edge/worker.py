"""The edge's worker: multiplies masked rows for the trusted side.

Its client half asks the trusted side to generate text, over a connection of its own for every request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import numpy as np

from sliplm.edge.connection import IDLE_SECONDS, Lent
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.open import OpenBlocks
from sliplm.errors import BusyError, LinkError, ProtocolError, SlipError
from sliplm.protocol import frames
from sliplm.protocol.channel import Channel
from sliplm.protocol.connect import Address
from sliplm.protocol.frames import Header, Kind, Role
from sliplm.protocol.messages import Chunk, GenerateRequest, decode_chunk, encode

GENERATE_SECONDS = 300.0
"""The longest wait for the next piece of text: a long prompt, or a queue, comes before the first one."""


class EdgeWorker(Lent):
    """Serves exchanges, and open `blocks` if there are some, see `Lent`; `generate` asks for text."""

    role = Role.WORK

    def __init__(
        self,
        engine: Multiplier,
        trusted: str | Address,
        identity: Path | str,
        blocks: OpenBlocks | None = None,
        *,
        idle_timeout: float = IDLE_SECONDS,
        generate_timeout: float = GENERATE_SECONDS,
    ) -> None:
        super().__init__(engine, trusted, identity, idle_timeout=idle_timeout)
        self._blocks = blocks
        self._generate_timeout = generate_timeout
        self._generations = WeakSet[Generation]()
        self._input = np.empty(0, np.uint32)

    def generate(self, request: GenerateRequest) -> Generation:
        """Start a generation on the trusted side and iterate over its text; close the iterator to cancel.

        Raises LinkError, IdentityError, BundleError or InternalError if the trusted side cannot be reached or refuses.
        """
        payload = encode(request)
        generation = Generation(self._connect(Role.REQUEST, self._generate_timeout), payload)
        self._generations.add(generation)
        return generation

    def stop(self) -> None:
        """See Lent. What was asked for here ends, too: there may be no other edge to go on with it."""
        super().stop()
        for generation in list(self._generations):
            generation.abort(self.failure)

    def _answer(self, channel: Channel, header: Header) -> None:
        kind, _, group, rows, sequence, length = header
        if kind in (Kind.BLOCKS, Kind.DROP) and self._blocks is not None:
            return self._compute(channel, header, self._blocks)
        if kind != Kind.EXCHANGE:
            raise ProtocolError(f"the trusted side sent {Kind(kind).name} out of turn")
        m, k = self._shape(group)
        if length != 4 * rows * k:
            raise ProtocolError(f"group {group} takes rows of {k} numbers")
        if self._input.size < rows * k:
            self._input = np.empty(rows * k, np.uint32)
        x = self._input[: rows * k].reshape(rows, k)
        channel.read_array(x)
        y = channel.stage(rows, m)  # the product is written where it is sent from
        start = time.perf_counter_ns()
        self._engine.product(group, x, out=y)
        done = self.counters
        done.compute_ns += time.perf_counter_ns() - start
        done.exchanges += 1
        done.rows += rows
        done.received_bytes += length
        done.sent_bytes += y.nbytes
        channel.send_staged(Kind.RESULT, group, sequence, y)

    def _compute(self, channel: Channel, header: Header, blocks: OpenBlocks) -> None:
        if header.kind == Kind.DROP:
            return blocks.forget(frames.parse_drop(channel.read(header)))
        run, rows = header.group, header.rows
        if run >= len(blocks.widths):
            raise ProtocolError(f"this bundle has {len(blocks.widths)} runs of open blocks, and no run {run}")
        width = blocks.widths[run]
        if header.length > frames.BLOCKS_BYTES + 4 * rows * width:
            raise ProtocolError(f"open blocks take rows of {width} numbers")
        payload = channel.read(header)
        request, first, kind, keep = frames.parse_blocks(payload, width, rows)
        x = np.frombuffer(payload, (np.float32, np.uint16)[kind - 1], offset=frames.BLOCKS_BYTES)
        x = x.reshape(rows, width).copy()  # bytes cannot be written to, which torch warns of
        start = time.perf_counter_ns()
        try:
            y = blocks.compute(run, request, first, x, keep)
        except BusyError as error:
            return channel.tell(error)
        done = self.counters
        done.compute_ns += time.perf_counter_ns() - start
        done.exchanges += 1
        done.rows += rows
        done.received_bytes += header.length
        done.sent_bytes += y.nbytes
        channel.send(Kind.STATES, y.tobytes(), group=run, rows=rows, sequence=header.sequence)

    def _ended(self) -> None:
        if self._blocks is not None:
            self._blocks.clear()


class Generation(Iterator[Chunk]):
    """The text of one request, piece by piece; the last chunk has a `finish_reason`.

    Iterating raises the trusted side's error as RequestError, VerificationError, IdentityError, InternalError or
    LinkError; text that ends without a `finish_reason` is never passed off as complete. `close` cancels, from any
    thread.
    """

    def __init__(self, channel: Channel, payload: bytes) -> None:
        self._channel = channel
        self._payload: bytes | None = payload
        self._ended = False
        self._why: SlipError | None = None
        self._turn = threading.Lock()

    def __next__(self) -> Chunk:
        with self._turn:
            if self._ended:
                raise StopIteration
            try:
                return self._next()
            except LinkError as error:
                self._end()
                if self._why is not None and type(error) is LinkError:
                    raise self._why from None
                raise
            except BaseException:
                self._end()
                raise

    def _next(self) -> Chunk:
        channel = self._channel
        if self._payload is not None:
            channel.send(Kind.GENERATE, self._payload)
            self._payload = None
        header = channel.receive()
        if header.kind == Kind.ERROR:
            raise channel.read_error(header)
        if header.kind not in (Kind.TEXT, Kind.DONE):
            raise ProtocolError(f"the trusted side sent {Kind(header.kind).name} out of turn")
        chunk = decode_chunk(channel.read(header))
        if (chunk.finish_reason is not None) != (header.kind == Kind.DONE):
            raise ProtocolError("the trusted side sent text after its end")
        if header.kind == Kind.DONE:
            self._end()
        return chunk

    def _end(self) -> None:
        self._ended = True
        self._channel.close()

    def abort(self, why: SlipError | None = None) -> None:
        """Let the thread that iterates, if any, get `why`, or else a LinkError, or the end."""
        self._why = why
        self._channel.abort()

    def close(self) -> None:
        """Cancel, from any thread."""
        self.abort()
        if self._turn.acquire(timeout=1.0):
            self._end()
            self._turn.release()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
