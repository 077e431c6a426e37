"""HELP connections: helpers, who make the images of one-time pads from keys that are drawn for them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from sliplm.errors import LinkError, ProtocolError
from sliplm.exchange.link import Shape
from sliplm.pads.buffers import Buffers
from sliplm.pads.pad import Array, Maker
from sliplm.pads.pool import BEAT_SECONDS
from sliplm.pads.stock import Job
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Header, Kind, PadsWanted, pack_pads
from sliplm.registry import Device

AHEAD = 2
"""Jobs that a helper has at a time: it computes one while the images of the other are on their way."""

LIE = "an image of a one-time pad that this helper made failed its check"

_log = logging.getLogger(__name__)


class Work(Protocol):
    """What there is to do for helpers: a `pads.pool.Pool`, or `pads.pairs.Pairs` before one."""

    def hire(self, maker: Maker) -> None: ...
    def dismiss(self, maker: Maker) -> None: ...
    def drop(self, name: str) -> int: ...
    def job(self, maker: Maker, timeout: float) -> Job | None: ...
    def deliver(self, job: Job, images: Array) -> None: ...


class HelperLink:
    """The trusted end of a HELP connection, and a maker of pads. `made` counts rows."""

    def __init__(self, channel: Channel, device: Device, shapes: list[Shape], rejected: Callable[[HelperLink], None]):
        self.device = device
        self.name = device.fingerprint
        self.parties = frozenset({device.party})
        self.made = 0
        self._channel, self._shapes, self._rejected = channel, shapes, rejected
        channel.peer = "the helper"
        self._sequence = 0
        self._buffers = Buffers()
        self._ended = threading.Event()

    def __repr__(self) -> str:
        return f"HelperLink({self.device.name})"

    def reject(self) -> None:
        self._rejected(self)

    def close(self) -> None:
        """End the link, from any thread."""
        self._ended.set()
        self._channel.abort()

    def serve(self, work: Work, keepalive: float, stopping: threading.Event) -> None:
        """Let the helper do `work` until its connection ends. Raises LinkError, ProtocolError."""
        under_way: deque[tuple[Job, int]] = deque()
        last = time.monotonic()
        while not self._ended.is_set() and not stopping.is_set():
            while len(under_way) < AHEAD and (job := work.job(self, 0 if under_way else BEAT_SECONDS)) is not None:
                self._ask(job)
                under_way.append((job, self._sequence))
            if under_way:
                last = time.monotonic()
                self._receive(work, *under_way.popleft())
            elif self._channel.peer_left():
                raise LinkError("the helper closed the connection")
            elif time.monotonic() - last > keepalive:
                self._ping()
                last = time.monotonic()

    def _ask(self, job: Job) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        payload = pack_pads(PadsWanted(job.key, 0, job.count))
        self._channel.send(Kind.PADS, payload, group=job.group, sequence=self._sequence)

    def _receive(self, work: Work, job: Job, sequence: int) -> None:
        images = self._buffers.array(job.count, self._shapes[job.group][0])
        header = self._channel.receive()
        wanted = Header(Kind.IMAGES, self._channel.version, job.group, job.count, sequence, images.nbytes)
        if header != wanted:
            raise self._refuse(header)
        self._channel.read_array(images)
        work.deliver(job, images)
        self.made += job.count

    def _ping(self) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._channel.send(Kind.PING, sequence=self._sequence)
        header = self._channel.receive()
        if header != (Kind.PONG, self._channel.version, 0, 0, self._sequence, 0):
            raise self._refuse(header)

    def _refuse(self, header: Header) -> LinkError:
        if header.kind == Kind.ERROR:
            return ProtocolError(f"the helper answered: {self._channel.read_error(header)}")
        return ProtocolError("the helper's answer does not belong to the question")


class Helpers:
    """The helpers of one server, over groups of `shapes`, doing `work`. One whose image was wrong is given to
    `suspend`; one that is idle for `keepalive` seconds proves that it is alive, and `timeout` is what a job may take.
    `made` counts the rows of all that there were, `lies` the wrong images."""

    def __init__(
        self,
        shapes: list[Shape],
        work: Work,
        suspend: Callable[[Device, str], None],
        keepalive: float,
        timeout: float,
        stopping: threading.Event,
    ) -> None:
        self._shapes, self._work, self._suspend = shapes, work, suspend
        self._keepalive, self._timeout, self._stopping = keepalive, timeout, stopping
        self._lock = threading.Lock()
        self._links: list[HelperLink] = []
        self._known: set[str] = set()
        self._made = 0  # by those that are gone
        self.lies = 0

    @property
    def made(self) -> int:
        with self._lock:
            return self._made + sum(link.made for link in self._links)

    def alive(self) -> list[HelperLink]:
        with self._lock:
            return list(self._links)

    def fingerprints(self) -> set[str]:
        """Of the devices whose pads may be in the stock, connected or not."""
        with self._lock:
            return set(self._known)

    def serve(self, channel: Channel, device: Device) -> None:
        """Keep a helper at work until its connection ends."""
        channel.set_timeout(self._timeout)
        link = HelperLink(channel, device, self._shapes, self._rejected)
        with self._lock:
            self._links.append(link)
            self._known.add(device.fingerprint)
        self._work.hire(link)
        try:
            link.serve(self._work, self._keepalive, self._stopping)
        finally:
            self._work.dismiss(link)
            with self._lock:
                self._links.remove(link)
                self._made += link.made

    def close(self, fingerprint: str | None = None) -> None:
        """End the links of one device and forget its unused pads; or end the links of all."""
        with self._lock:  # whoever comes later is known again, and cut off by the next look
            known = fingerprint in self._known
            self._known.discard(fingerprint or "")
        self._end(fingerprint)
        if fingerprint is not None and known:
            dropped = self._work.drop(fingerprint)
            _log.warning("a helper was cut off: %d unused pads of its are dropped", dropped)
            self._end(fingerprint)  # who came meanwhile was dismissed with those before, and would wait in vain

    def _end(self, fingerprint: str | None) -> None:
        with self._lock:
            links = [link for link in self._links if fingerprint in (None, link.name)]
        for link in links:
            link.close()

    def _rejected(self, link: HelperLink) -> None:
        with self._lock:
            self.lies += 1
        self._suspend(link.device, LIE)  # which also cuts it off
