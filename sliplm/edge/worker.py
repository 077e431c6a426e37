"""The edge's worker: connects out to the trusted side, multiplies until told to stop, and comes back when cut
off.

Its client half asks the trusted side to generate text, over a connection of its own for every request.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sliplm.edge.multiplier import Multiplier
from sliplm.errors import BundleError, HandshakeError, IdentityError, LinkError, ProtocolError, SlipError
from sliplm.protocol import tls
from sliplm.protocol.channel import Address, Channel, connect, parse_address
from sliplm.protocol.frames import Header, Kind, Role
from sliplm.protocol.messages import Chunk, GenerateRequest, decode_chunk, encode

IDLE_SECONDS = 15.0
"""Three keep-alives of the trusted side: after this much silence it is taken for gone."""

GENERATE_SECONDS = 300.0
"""The longest wait for the next piece of text: a long prompt, or a queue, comes before the first one."""

FIRST_DELAY, LAST_DELAY = 0.1, 2.0

ATTEMPTS = 5
"""So many handshakes of a worker that never was connected fail for the same reason before it gives up."""

_log = logging.getLogger(__name__)


class WorkCounters:
    """What a worker has done since it was made. It alone writes, and whoever likes reads."""

    def __init__(self) -> None:
        self.connections = self.exchanges = self.rows = self.received_bytes = self.sent_bytes = self.compute_ns = 0


class EdgeWorker:
    """Serves the products of `engine` to the trusted side at `trusted` (HOST:PORT), as the device of
    `identity`.

    `connected` is set while a WORK connection is up; `model_name` is what the trusted side calls its model, `failure`
    is why the last connection was not made, if it was not, and `counters` tell what was done.
    Raises IdentityError or LinkError if the arguments make no sense.
    """

    def __init__(
        self,
        engine: Multiplier,
        trusted: str | Address,
        identity: Path | str,
        *,
        idle_timeout: float = IDLE_SECONDS,
        generate_timeout: float = GENERATE_SECONDS,
    ) -> None:
        self.connected = threading.Event()
        self.counters = WorkCounters()
        self.model_name: str | None = None
        self.failure: SlipError | None = None
        self._engine = engine
        self._address = parse_address(trusted) if isinstance(trusted, str) else trusted
        self._identity = identity
        self._context = tls.client_context(identity)
        self._idle_timeout = idle_timeout
        self._generate_timeout = generate_timeout
        self._stopping = threading.Event()
        self._channel: Channel | None = None
        self._input = np.empty(0, np.uint32)

    def run(self) -> None:
        """Serve until `stop`, reconnecting whenever the connection is lost.

        Raises IdentityError, BundleError or ProtocolError if the trusted side refuses this edge for good. A failed
        handshake proves nothing about the trusted side, so it is final only for a worker that was never connected,
        when it failed the same way ATTEMPTS times in a row: then it is set up wrong.
        """
        delay = FIRST_DELAY
        ever_connected = False
        failure, times = "", 0  # of the handshake, in a row
        while not self._stopping.is_set():
            try:
                channel = self._connect(Role.WORK, self._idle_timeout)
            except HandshakeError as error:
                times = times + 1 if str(error) == failure else 1
                failure = str(error)
                if times >= ATTEMPTS and not ever_connected:
                    raise
                self._context = tls.client_context(self._identity)  # what is wrong on this side is final at once
                _log.warning("%s; trying again", error)
            except (IdentityError, BundleError, ProtocolError):
                raise
            except SlipError as error:
                times = 0
                _log.warning("%s; trying again", error)
            else:
                ever_connected, times = True, 0
                if self._serve(channel):
                    delay = FIRST_DELAY
            # Full jitter would sometimes hammer, none would make all edges return in step.
            self._stopping.wait(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LAST_DELAY)

    def stop(self) -> None:
        """Make `run` return soon, from any thread or a signal handler."""
        self._stopping.set()
        if (channel := self._channel) is not None:
            channel.abort()

    def generate(self, request: GenerateRequest) -> Generation:
        """Start a generation on the trusted side and iterate over its text; close the iterator to cancel.

        Raises LinkError, IdentityError, BundleError or InternalError if the trusted side cannot be reached or refuses.
        """
        payload = encode(request)
        channel = self._connect(Role.REQUEST, self._generate_timeout)
        return Generation(channel, payload)

    def _connect(self, role: Role, timeout: float) -> Channel:
        digest = self._engine.digest
        try:
            channel, welcome = connect(self._address, self._context, role, digest, timeout)
        except SlipError as error:
            self.failure = error
            raise
        self.failure = None
        self.model_name = welcome.model_name
        return channel

    def _serve(self, channel: Channel) -> bool:
        """Answer frames until the connection ends; whether there were any."""
        served = False
        self._channel = channel
        self.connected.set()
        self.counters.connections += 1
        _log.info("connected to the trusted side")
        try:
            if self._stopping.is_set():  # `stop` may have come before it could see the channel
                return served
            while True:
                header = channel.receive(spin=served)
                if header.kind == Kind.EXCHANGE:
                    self._exchange(channel, header)
                elif header.kind == Kind.PING:
                    channel.send(Kind.PONG, sequence=header.sequence)
                elif header.kind == Kind.ERROR:
                    raise channel.read_error(header)
                else:
                    raise ProtocolError(f"the trusted side sent {Kind(header.kind).name} out of turn")
                served = True
        except SlipError as error:
            if not self._stopping.is_set():
                _log.warning("disconnected: %s", error)
            if isinstance(error, ProtocolError):
                with contextlib.suppress(LinkError):
                    channel.tell(error)
            return served
        except MemoryError:
            _log.warning("disconnected: this machine ran out of memory")
            return served
        finally:
            self.connected.clear()
            self._channel = None
            channel.close()

    def _exchange(self, channel: Channel, header: Header) -> None:
        _, _, group, rows, sequence, length = header
        if group >= len(self._engine.shapes):
            raise ProtocolError(f"this bundle has {len(self._engine.shapes)} groups, and no group {group}")
        m, k = self._engine.shapes[group]
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
        self._turn = threading.Lock()

    def __next__(self) -> Chunk:
        with self._turn:
            if self._ended:
                raise StopIteration
            try:
                return self._next()
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

    def close(self) -> None:
        """Cancel. The thread that iterates, if any, gets a LinkError or the end."""
        self._channel.abort()  # wakes a thread that waits for text
        if self._turn.acquire(timeout=1.0):
            self._end()
            self._turn.release()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
