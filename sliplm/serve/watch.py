"""Who may stay: looks at the registry a few times a second, and cuts off devices that may not be connected any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

from sliplm.errors import IdentityError, RegistryError, locate
from sliplm.registry.devices import Device, Devices

POLL_SECONDS = 0.2

STALE_SECONDS = 3.0
"""Who has not seen the registry for so long does not know who may stay. A look may wait for another writer."""

_log = logging.getLogger(__name__)


class Watch:
    """Compares the devices that `connected` names (by fingerprint) with the registry, and calls `cut` with each that
    may not stay, and why, until it is gone. `start` begins, `close` ends, and writes suspensions that still wait."""

    def __init__(
        self,
        devices: Devices,
        connected: Callable[[], Collection[str]],
        cut: Callable[[str, IdentityError], None],
    ) -> None:
        self._devices = devices
        self._connected = connected
        self._cut = cut
        self._known: dict[str, Device] = {}
        self._version = -1
        self._unsuspended: dict[str, tuple[Device, str]] = {}  # those whose suspension is not in the registry yet
        self._lock = threading.Lock()  # of the dictionary: nobody waits for the registry with it
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._looked_at = 0.0
        self._failing = False

    @property
    def healthy(self) -> bool:
        """Whether the registry answered last time, and lately: a look at a server that is gone may hang."""
        return not self._failing and time.monotonic() - self._looked_at <= STALE_SECONDS

    def start(self) -> None:
        self._looked_at = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(5)
        try:
            self._write()
        except RegistryError as error:
            _log.error("a suspension could not be written to the registry: %s", error)

    def admit(self, fingerprint: str) -> Device:
        """The device with this certificate. Raises as `Devices.admit` does."""
        if fingerprint in self._unsuspended:
            raise IdentityError("this device is suspended: ask the owner of the model")
        return self._devices.admit(fingerprint)

    def suspend(self, device: Device, reason: str) -> None:
        """Suspend `device` and cut it off, now; the registry is told as soon as it can be."""
        with self._lock:
            self._unsuspended[device.fingerprint] = device, reason
        _log.error("device %s is suspended: %s", device.name, reason, extra={"device": device.name})
        self._cut(device.fingerprint, IdentityError(f"the device {device.name!r} is suspended"))
        try:
            self._write()
        except RegistryError as error:
            _log.error("a suspension is not in the registry yet: %s", error)

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self._look()
            except Exception as error:  # whatever it is, nobody else would notice that revocations do nothing any more
                self._failing = True
                _log.error("devices cannot be looked up: %s", locate(error))

    def _look(self) -> None:
        try:
            self._write()
        except RegistryError as error:
            _log.error("a suspension is not in the registry yet: %s", error)
        try:
            if (version := self._devices.version()) != self._version:
                self._known = {d.fingerprint: d for d in self._devices.all()}
                self._version = version
            self._looked_at = time.monotonic()
            if self._failing:
                _log.warning("the device registry answers again")
            self._failing = False
        except RegistryError as error:
            if not self._failing:
                _log.error("devices cannot be looked up: %s", error)
            self._failing = True
        for fingerprint in self._connected():
            try:
                # One that was enrolled since is not known if the registry does not answer, and was looked up then.
                if (device := self._known.get(fingerprint)) is not None:
                    device.require_active()
                if fingerprint in self._unsuspended:
                    raise IdentityError("this device is suspended: ask the owner of the model")
            except IdentityError as error:
                self._cut(fingerprint, error)

    def _write(self) -> None:
        with self._writing:
            with self._lock:
                waiting = list(self._unsuspended.items())
            for fingerprint, (device, reason) in waiting:
                self._devices.suspend(device, reason)
                with self._lock:
                    self._unsuspended.pop(fingerprint, None)
