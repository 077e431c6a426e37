"""WORK connections: the links of all devices, kept alive, and claimed by their requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from sliplm.errors import LinkError, NoWorkerError
from sliplm.exchange.link import Shape
from sliplm.protocol.channel import Channel
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import Device

NO_WORKER = "this device has no worker connected: start `slip edge` on it, or try again soon"


class Links:
    """Links over groups of `shapes`. One that was idle for `keepalive` seconds proves that it is alive, `timeout` is
    what an exchange may take, and a request waits `patience` seconds for a link. None is served any more, nor waited
    for, once `stopping` is set and `close` called."""

    def __init__(
        self, shapes: Sequence[Shape], keepalive: float, timeout: float, patience: float, stopping: threading.Event
    ) -> None:
        self._shapes = list(shapes)
        self._keepalive = keepalive
        self._timeout = timeout
        self._patience = patience
        self._stopping = stopping
        self._changed = threading.Condition()
        self._links: dict[str, list[RemoteLink]] = {}  # by device fingerprint, newest last
        self._devices: WeakKeyDictionary[RemoteLink, Device] = WeakKeyDictionary()

    def alive(self) -> list[RemoteLink]:
        """Those of all devices, the newest of each device last."""
        with self._changed:
            return [link for group in self._links.values() for link in group if link.alive]

    def serve(self, channel: Channel, device: Device) -> None:
        """Keep a link alive until it ends. The exchanges come from other threads."""
        link = RemoteLink(channel, self._shapes, device.party, self._timeout)
        with self._changed:
            self._links.setdefault(device.fingerprint, []).append(link)
            self._devices[link] = device
            self._changed.notify_all()
        try:
            while not link.wait_closed(self._keepalive) and not self._stopping.is_set():
                if time.monotonic() - link.last_used > self._keepalive / 2:
                    link.ping()
        finally:
            with self._changed:
                self._links[device.fingerprint].remove(link)
                if not self._links[device.fingerprint]:
                    del self._links[device.fingerprint]
            link.close()

    def device(self, link: RemoteLink) -> Device:
        """Whose `link` is or was."""
        return self._devices[link]

    def claim(self, device: Device) -> RemoteLink:
        """The device's newest link that answers. Raises NoWorkerError if none turns up in time."""
        deadline = time.monotonic() + self._patience
        while True:
            with self._changed:
                while not (alive := [k for k in self._links.get(device.fingerprint, ()) if k.alive]):
                    left = deadline - time.monotonic()
                    if left <= 0 or self._stopping.is_set():
                        raise NoWorkerError(NO_WORKER)
                    self._changed.wait(left)
            link = alive[-1]
            try:
                if time.monotonic() - link.last_used > 1.0:
                    link.ping()  # an edge that lost its power would otherwise cost the request a long wait
            except LinkError:
                continue
            return link

    def close(self, fingerprint: str | None = None) -> None:
        """End the links of one device, or of all: the generations that use them fail, and say why."""
        with self._changed:
            links = [link for of, group in self._links.items() if fingerprint in (None, of) for link in group]
            self._changed.notify_all()
        for link in links:
            link.close()
