"""REQUEST connections: one request each, its text, and the sentence that says why there is no more of it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator

import msgspec

from sliplm.errors import BusyError, Code, LinkError, ProtocolError, SlipError, VerificationError, locate
from sliplm.exchange.edges import Edges
from sliplm.protocol import frames
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Kind
from sliplm.protocol.messages import Chunk, decode_request, encode
from sliplm.registry import Device
from sliplm.serve.connections import Known
from sliplm.serve.service import Service

LOG_BYTES = 200
"""Errors may quote what a device sent: the log takes so much of it, on one line."""

SHUTTING_DOWN = "the trusted side is shutting down"

_log = logging.getLogger(__name__)


class Requests:
    """Answers requests with `service`, over `edges`. While `draining` none begins, and once `stopping` is set they end;
    `timeout` limits the wait for a peer."""

    def __init__(
        self,
        service: Service,
        edges: Edges,
        draining: Callable[[], bool],
        stopping: threading.Event,
        timeout: float,
    ) -> None:
        self._service = service
        self._edges = edges
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
        try:
            if self._draining():
                raise BusyError(SHUTTING_DOWN)
            request = decode_request(channel.read(header))
            self._send(channel, self._service.answer(request, device, self._edges), known)
        except _PeerGone:
            _log.info("device %s cancelled its request", device.name)
        except _Told:
            _log.warning("device %s: %s", device.name, known.reason)
        except Exception as failure:
            error = failure if isinstance(failure, VerificationError) else known.reason or failure
            expected = isinstance(error, SlipError)
            why = frames.clean(str(error), LOG_BYTES) if expected else f"internal error: {locate(error)}"
            _log.warning("device %s: %s", device.name, why)
            self._tell(channel, error)

    def _tell(self, channel: Channel, error: Exception) -> None:
        if isinstance(error, SlipError) and error.code == Code.FAILED and not error.told:
            error = LinkError(f"generation stopped: {SHUTTING_DOWN if self._stopping.is_set() else error}")
        channel.tell(error)

    def _send(self, channel: Channel, chunks: Generator[Chunk, None, None], known: Known) -> None:
        with contextlib.closing(chunks):
            while True:
                with known.busy():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                if self._stopping.is_set():
                    chunks.throw(LinkError(SHUTTING_DOWN))
                if known.reason is not None:
                    self._tell(channel, known.reason)  # now: what is computed for it may take seconds to end
                    with contextlib.suppress(LinkError):
                        chunks.throw(LinkError("the device was cut off"))
                    raise _Told
                try:
                    if channel.peer_left():
                        raise _PeerGone
                    if channel.version < frames.DRAFTS_VERSION:
                        chunk = msgspec.structs.replace(chunk, accepted_tokens=0, rejected_tokens=0)
                    channel.send(Kind.TEXT if chunk.finish_reason is None else Kind.DONE, encode(chunk))
                except LinkError:
                    raise _PeerGone from None


class _PeerGone(Exception):
    """The requester closed its connection: nobody is left to tell."""


class _Told(Exception):
    """The requester knows why there is no more."""
