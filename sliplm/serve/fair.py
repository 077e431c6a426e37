"""Who generates next: a bounded queue that shares the engine's slots fairly between devices.

A free slot goes to the waiting device with the fewest running requests, and among equals to the one whose last turn is
longest ago. So a device with a hundred waiting requests holds up another one's first by one slot, not by a hundred.
Who holds a slot for too long gives it up to a device that has none.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque

from sliplm.errors import BusyError, SlipError

MAX_WAITING = 1024
MAX_WAITING_PER_DEVICE = 128
RETRY_SECONDS = 5


class Ticket:
    """A request's place in the queue, and then its slot. Leave it in any case, and once. From the time `due` on it may
    have to, so that another one can run."""

    def __init__(self, queue: FairQueue, device: str, concurrent: int) -> None:
        self.device = device
        self.concurrent = concurrent
        self.due = math.inf
        self._queue = queue
        self._decided = threading.Event()
        self._error: SlipError | None = None

    def wait(self, timeout: float) -> bool:
        """Whether the slot is there, after at most `timeout` seconds. Raises what `FairQueue.refuse` was given."""
        if not self._decided.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def _decide(self, error: SlipError | None = None) -> None:
        self._error = error
        self._decided.set()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self._queue._leave(self)


class FairQueue:
    """Shares `slots` between devices, named by any string."""

    def __init__(
        self, slots: int, max_waiting: int = MAX_WAITING, max_waiting_per_device: int = MAX_WAITING_PER_DEVICE
    ) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self._max_waiting_per_device = max_waiting_per_device
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._granted: set[Ticket] = set()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    @property
    def running(self) -> int:
        return len(self._granted)

    @property
    def waiting(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def join(self, device: str, concurrent: int = 0) -> Ticket:
        """Wait for a slot, of which `device` holds at most `concurrent` (0: any number). Raises BusyError when too
        many wait already."""
        ticket = Ticket(self, device, concurrent)
        with self._lock:
            if len(self._waiting.get(device, ())) >= self._max_waiting_per_device:
                raise BusyError("this device has too many requests waiting: try again later", RETRY_SECONDS)
            if sum(map(len, self._waiting.values())) >= self._max_waiting:
                raise BusyError("the trusted side has too many requests waiting: try again later", RETRY_SECONDS)
            self._waiting.setdefault(device, deque()).append(ticket)
            self._grant()
        return ticket

    def refuse(self, error: SlipError, device: str | None = None) -> None:
        """Send those who wait away, of one device or all."""
        with self._lock:
            for name in [device] if device is not None else list(self._waiting):
                for ticket in self._waiting.pop(name, ()):
                    ticket._decide(error)

    def wants_back(self, ticket: Ticket) -> bool:
        """Whether `ticket` should give its slot up: none has been due for longer, and a device without a slot waits."""
        with self._lock:
            starving = any(not self._running[device] for device in self._waiting)
            return starving and time.monotonic() > ticket.due == min(t.due for t in self._granted)

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self._granted:
                self._granted.remove(ticket)
                self._running[ticket.device] -= 1
                if not self._running[ticket.device]:
                    del self._running[ticket.device]
                self._grant()
            elif ticket in self._waiting.get(ticket.device, ()):
                self._waiting[ticket.device].remove(ticket)
                if not self._waiting[ticket.device]:
                    del self._waiting[ticket.device]

    def _grant(self) -> None:
        while len(self._granted) < self._slots:
            able = [d for d, q in self._waiting.items() if not q[0].concurrent or self._running[d] < q[0].concurrent]
            if not able:
                return
            device = min(able, key=lambda d: (self._running[d], self._last_turn.get(d, 0)))
            ticket = self._waiting[device].popleft()
            if not self._waiting[device]:
                del self._waiting[device]
            self._turns += 1
            self._last_turn[device] = self._turns
            self._running[device] += 1
            self._granted.add(ticket)
            ticket._decide()
