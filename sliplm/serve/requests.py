"""REQUEST connections: one request each, its text, and the sentence that says why there is no more of it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator

from sliplm.errors import BusyError, Code, LinkError, ProtocolError, SlipError, VerificationError, locate
from sliplm.protocol import frames
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Kind
from sliplm.protocol.messages import Chunk, decode_request, encode
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import Device
from sliplm.serve.connections import Known
from sliplm.serve.links import Links
from sliplm.serve.service import Service

LOG_BYTES = 200
"""Errors may quote what a device sent: the log takes so much of it, on one line."""

SHUTTING_DOWN = "the trusted side is shutting down"
LIE = "an answer of this device failed its check"

_log = logging.getLogger(__name__)


class Requests:
    """Answers requests with `service`, over `links`. A device whose answer fails its check is given to `suspend`. While
    `draining` none begins, and once `stopping` is set they end; `timeout` limits the wait for a peer."""

    def __init__(
        self,
        service: Service,
        links: Links,
        suspend: Callable[[Device, str], None],
        draining: Callable[[], bool],
        stopping: threading.Event,
        timeout: float,
    ) -> None:
        self._service = service
        self._links = links
        self._suspend = suspend
        self._draining = draining
        self._stopping = stopping
        self._timeout = timeout

    def serve(self, channel: Channel, device: Device, known: Known) -> None:
        """Answer the one request of a connection. Raises LinkError if the peer does not ask, or cannot be told why its
        request failed."""
        header = channel.receive()
        if header.kind != Kind.GENERATE:
            raise ProtocolError("the edge did not follow HELLO with GENERATE")
        channel.set_timeout(self._timeout)
        link: RemoteLink | None = None

        def claim() -> RemoteLink:
            nonlocal link
            link = self._links.claim(device)
            return link

        try:
            if self._draining():
                raise BusyError(SHUTTING_DOWN)
            request = decode_request(channel.read(header))
            self._send(channel, self._service.answer(request, device, claim))
        except _PeerGone:
            _log.info("device %s cancelled its request", device.name)
        except Exception as error:
            if isinstance(error, VerificationError):
                self._service.metrics.verification_failures.inc()
                if link is not None:
                    link.close()
                self._suspend(device, LIE)
            elif known.reason is not None:
                error = known.reason
            expected = isinstance(error, SlipError)
            why = frames.clean(str(error), LOG_BYTES) if expected else f"internal error: {locate(error)}"
            _log.warning("device %s: %s", device.name, why)
            self._tell(channel, error)

    def _tell(self, channel: Channel, error: Exception) -> None:
        if isinstance(error, SlipError) and error.code == Code.FAILED and not error.told:
            error = LinkError(f"generation stopped: {SHUTTING_DOWN if self._stopping.is_set() else error}")
        channel.tell(error)

    def _send(self, channel: Channel, chunks: Generator[Chunk, None, None]) -> None:
        with contextlib.closing(chunks):
            for chunk in chunks:
                if self._stopping.is_set():
                    chunks.throw(LinkError(SHUTTING_DOWN))
                try:
                    if channel.peer_left():
                        raise _PeerGone
                    channel.send(Kind.TEXT if chunk.finish_reason is None else Kind.DONE, encode(chunk))
                except LinkError:
                    raise _PeerGone from None


class _PeerGone(Exception):
    """The requester closed its connection: nobody is left to tell."""
