"""Metering: every request has a usage record before it generates, and none generates while records cannot be written.

A thread writes the tokens of all running requests once a second. What could not be written at a request's end is kept
and tried again; if the server dies before that, the record is closed with the tokens of its last update.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time

from sliplm.errors import BusyError, RegistryError, locate
from sliplm.registry.devices import Device
from sliplm.registry.usage import Tokens, Usage, Used

UPDATE_SECONDS = 1.0
SWEEP_SECONDS = 10.0

GRACE_SECONDS = 5.0
"""Requests stop when their tokens could not be recorded for so long. Less than usage.STALE_SECONDS, after which
another server takes them for interrupted."""

UNMETERED = "the trusted side cannot record usage just now: try again later"

_log = logging.getLogger(__name__)


class Record:
    """The usage of one running request; `request` is its id."""

    def __init__(self) -> None:
        self.request = secrets.token_hex(16)
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.request, self.prompt_tokens, self.completion_tokens)


class Meter:
    """Writes usage records; `start` begins the updates, `close` ends them and writes what is left."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._lock = threading.Lock()
        self._running: set[Record] = set()
        self._unwritten: list[tuple[Tokens, str]] = []
        self._written_at = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)
        try:
            self._write()
        except RegistryError as error:
            _log.error("usage could not be recorded to the end: %s", error)

    def begin(self, device: Device) -> tuple[Record, Used]:
        """Open a record; it, and what the device used today. Raises BusyError if that is impossible."""
        record = Record()
        try:
            used = self._usage.begin(record.request, device)
        except RegistryError as error:
            _log.error("a request was refused: %s", error)
            raise BusyError(UNMETERED) from None
        with self._lock:
            if not self._running:
                self._written_at = time.monotonic()
            self._running.add(record)
        return record, used

    @property
    def healthy(self) -> bool:
        """Whether records could be written lately."""
        return time.monotonic() - self._written_at <= GRACE_SECONDS

    def check(self) -> None:
        """Raises BusyError if the tokens of running requests could not be recorded for too long."""
        if not self.healthy:
            raise BusyError(UNMETERED)

    def finish(self, record: Record, outcome: str) -> None:
        """Close a record, now or as soon as it can be written."""
        with self._lock:
            self._running.discard(record)
        try:
            self._usage.finish(record.tokens, outcome)
        except RegistryError as error:
            _log.error("a usage record has to wait: %s", error)
            with self._lock:
                self._unwritten.append((record.tokens, outcome))

    def _run(self) -> None:
        sweep_at = 0.0
        while True:
            try:
                if time.monotonic() >= sweep_at:
                    if count := self._usage.sweep():
                        _log.warning("%d requests were interrupted by the end of a server", count)
                    sweep_at = time.monotonic() + SWEEP_SECONDS
                self._write()
            except Exception as error:  # whatever it is: while this thread fails, nothing is generated for long
                why = error if isinstance(error, RegistryError) else locate(error)
                _log.error("usage cannot be recorded: %s", why)
            if self._closed.wait(UPDATE_SECONDS):
                return

    def _write(self) -> None:
        with self._lock:
            running = [record.tokens for record in self._running]
            unwritten, self._unwritten = self._unwritten, []
        try:
            self._usage.update(running)
            while unwritten:
                self._usage.finish(*unwritten[-1])
                unwritten.pop()
        finally:
            with self._lock:
                self._unwritten += unwritten
        self._written_at = time.monotonic()
