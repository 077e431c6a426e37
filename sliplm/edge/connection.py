"""A connection that lends this machine to the trusted side: made, kept, and made again when it is lost."""

from __future__ import annotations

import abc
import contextlib
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path

from sliplm.edge.multiplier import Multiplier
from sliplm.errors import BundleError, HandshakeError, IdentityError, LinkError, ProtocolError, SlipError
from sliplm.protocol import tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.connect import Address, connect, parse_address
from sliplm.protocol.frames import Header, Kind, Role

IDLE_SECONDS = 15.0
"""Three keep-alives of the trusted side: after this much silence it is taken for gone."""

FIRST_DELAY, LAST_DELAY = 0.1, 2.0

ATTEMPTS = 5
"""So many handshakes of one that never was connected fail for the same reason before it gives up."""

_log = logging.getLogger(__name__)


class WorkCounters:
    """What a worker has done since it was made. It alone writes, and whoever likes reads."""

    def __init__(self) -> None:
        self.connections = self.exchanges = self.rows = self.received_bytes = self.sent_bytes = self.compute_ns = 0


class Lent(abc.ABC):
    """Answers the trusted side at `trusted` (HOST:PORT) with the products of `engine`, as the device of `identity`.

    `connected` is set while a connection is up; `model_name` is what the trusted side calls its model, `failure` is why
    the last connection was not made, if it was not, and `counters` tell what was done.
    Raises IdentityError or LinkError if the arguments make no sense.
    """

    role: Role

    def __init__(
        self, engine: Multiplier, trusted: str | Address, identity: Path | str, *, idle_timeout: float = IDLE_SECONDS
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
        self._stopping = threading.Event()
        self._channel: Channel | None = None

    def run(self) -> None:
        """Serve until `stop`, reconnecting whenever the connection is lost.

        Raises IdentityError, BundleError or ProtocolError if the trusted side refuses this machine for good. A failed
        handshake proves nothing about the trusted side, so it is final only for one that was never connected, when it
        failed the same way ATTEMPTS times in a row: then it is set up wrong.
        """
        delay = FIRST_DELAY
        ever_connected = False
        failure, times = "", 0  # of the handshake, in a row
        while not self._stopping.is_set():
            try:
                channel = self._connect(self.role, self._idle_timeout)
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

    def once_connected(self, tell: Callable[[], None]) -> None:
        """Call `tell` when the first connection is up, from another thread."""

        def wait() -> None:
            self.connected.wait()
            tell()

        threading.Thread(target=wait, daemon=True).start()

    def stop(self) -> None:
        """Make `run` return soon, from any thread or a signal handler."""
        self._stopping.set()
        if (channel := self._channel) is not None:
            channel.abort()

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
                if header.kind == Kind.PING:
                    channel.send(Kind.PONG, sequence=header.sequence)
                elif header.kind == Kind.ERROR:
                    raise channel.read_error(header)
                else:
                    self._answer(channel, header)
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
            self._ended()

    @abc.abstractmethod
    def _answer(self, channel: Channel, header: Header) -> None:
        """Answer a frame. Raises ProtocolError if it is none that this kind of connection brings."""

    def _ended(self) -> None:  # noqa: B027 - most have nothing to do
        """A connection has ended."""

    def _shape(self, group: int) -> tuple[int, int]:
        """(M, K) of a group that the trusted side named. Raises ProtocolError."""
        if group >= len(self._engine.shapes):
            raise ProtocolError(f"this bundle has {len(self._engine.shapes)} groups, and no group {group}")
        return self._engine.shapes[group]
