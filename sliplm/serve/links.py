"""WORK connections: the links of all devices, kept alive; together they are the edges that requests are computed on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sliplm.exchange.edges import Edges
from sliplm.exchange.link import Shape
from sliplm.protocol.channel import Channel
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import Device


class Links:
    """Links over groups of `shapes`. One that was idle for `keepalive` seconds proves that it is alive, `timeout` is
    what an exchange may take, and an exchange waits `patience` seconds for an edge. None is served any more, nor waited
    for, once `stopping` is set and `close` called. A device whose answer was wrong is given to `lied`."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        keepalive: float,
        timeout: float,
        patience: float,
        lied: Callable[[Device], None],
        stopping: threading.Event,
    ) -> None:
        self.edges = Edges(patience)
        self._shapes = list(shapes)
        self._keepalive = keepalive
        self._timeout = timeout
        self._lied = lied
        self._stopping = stopping
        self._lock = threading.Lock()
        self._links: dict[str, list[RemoteLink]] = {}  # by device fingerprint, newest last

    def alive(self) -> list[RemoteLink]:
        """Those of all devices, the newest of each device last."""
        with self._lock:
            return [link for group in self._links.values() for link in group if link.alive]

    def serve(self, channel: Channel, device: Device) -> None:
        """Keep a link alive until it ends. The exchanges come from other threads."""
        link = RemoteLink(channel, self._shapes, device.party, self._timeout)
        with self._lock:
            self._links.setdefault(device.fingerprint, []).append(link)
        self.edges.add(link, device.name, lambda: self._lied(device))
        try:
            while not link.wait_closed(self._keepalive) and not self._stopping.is_set():
                if time.monotonic() - link.last_used > self._keepalive / 2:
                    link.ping()
        finally:
            self.edges.remove(link)
            with self._lock:
                self._links[device.fingerprint].remove(link)
                if not self._links[device.fingerprint]:
                    del self._links[device.fingerprint]
            link.close()

    def close(self, fingerprint: str | None = None) -> None:
        """End the links of one device, or of all: exchanges under way go to others, if there are any."""
        with self._lock:
            links = [link for of, group in self._links.items() if fingerprint in (None, of) for link in group]
        if fingerprint is None:
            self.edges.close()
        for link in links:
            link.close()
