"""Who is connected: strangers, who have not shown an enrolled certificate yet, and connections of known devices.

Strangers are counted apart from devices, so that they cannot lock them out; and no device may take all of what is there
for devices.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

from sliplm.errors import BusyError, IdentityError
from sliplm.protocol.frames import Role

CUT_SECONDS = 0.4


class Known:
    """A connection whose device is known; `reason` and `expelled` say why and since when it is being cut off.

    While its thread computes, and so sends nothing, `busy_until` is infinite: it can say why only afterwards.
    """

    def __init__(self, sock: socket.socket, fingerprint: str, role: Role) -> None:
        self.sock, self.fingerprint, self.role = sock, fingerprint, role
        self.reason: IdentityError | None = None
        self.expelled = 0.0
        self.busy_until = 0.0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.busy_until = math.inf
        try:
            yield
        finally:
            self.busy_until = time.monotonic()


class Connections:
    """All of one server, each with the thread that serves it; `max_workers` and `max_requests` are those of one device.
    Its length is the number of those whose device is known."""

    def __init__(self, max_strangers: int, max_connections: int, max_workers: int, max_requests: int) -> None:
        self._max_strangers = max_strangers
        self._max_connections = max_connections
        self._max_workers = max_workers
        self._max_requests = max_requests  # those that wait included
        self._lock = threading.Lock()
        self._strangers: dict[threading.Thread, tuple[socket.socket, bytes]] = {}  # oldest first, with their network
        self._known: dict[threading.Thread, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def strangers(self) -> int:
        return len(self._strangers)

    def admit(self, thread: threading.Thread, sock: socket.socket, host: str) -> None:
        """Take a stranger in. If there are too many, the oldest one of the network that has most is cut: whoever floods
        the server evicts itself."""
        with self._lock:
            if len(self._strangers) >= self._max_strangers:
                busiest, _ = Counter(network for _, network in self._strangers.values()).most_common(1)[0]
                oldest = next(t for t, (_, network) in self._strangers.items() if network == busiest)
                cut(self._strangers.pop(oldest)[0])
            self._strangers[thread] = sock, _network(host)

    def identify(self, sock: socket.socket, fingerprint: str, role: Role) -> Known:
        """Count this thread's connection as its device's from now on. Raises BusyError if that has too many, or all
        have."""
        me = threading.current_thread()
        with self._lock:
            mine = [c.role for c in self._known.values() if c.fingerprint == fingerprint]
            if role in (Role.WORK, Role.HELP) and mine.count(role) >= self._max_workers:
                raise BusyError(f"this device has {self._max_workers} workers connected already: try again later")
            if role == Role.REQUEST and mine.count(Role.REQUEST) >= self._max_requests:
                raise BusyError(f"this device has {self._max_requests} requests running or waiting: try again later")
            free = self._max_connections - len(self._known)
            # Those that have many leave half of the rest to others, so that a few cannot take all.
            if not free or len(mine) >= max(self._max_workers, free // 2):
                raise BusyError("the trusted side has too many connections: try again later")
            if self._strangers.pop(me, None) is None:
                raise BusyError("the trusted side gave this connection up: try again later")
            known = self._known[me] = Known(sock, fingerprint, role)
        return known

    def leave(self, thread: threading.Thread) -> None:
        """Forget the connection of `thread`."""
        with self._lock:
            self._strangers.pop(thread, None)
            self._known.pop(thread, None)

    def fingerprints(self) -> set[str]:
        """The devices that have any."""
        with self._lock:
            return {known.fingerprint for known in self._known.values()}

    def requests(self) -> bool:
        """Whether any device has a REQUEST connection."""
        with self._lock:
            return any(known.role == Role.REQUEST for known in self._known.values())

    def expel(self, fingerprint: str, reason: IdentityError) -> None:
        """Note why a device has to leave, for its threads to say; those that could for CUT_SECONDS and are still there,
        because their peer does not read, are cut by the next call."""
        with self._lock:
            mine = [known for known in self._known.values() if known.fingerprint == fingerprint]
        for known in mine:
            if known.reason is None:
                known.reason, known.expelled = reason, time.monotonic()
            elif time.monotonic() - max(known.expelled, known.busy_until) > CUT_SECONDS:
                cut(known.sock)

    def all(self) -> dict[threading.Thread, socket.socket]:
        with self._lock:
            strangers = {thread: sock for thread, (sock, _) in self._strangers.items()}
            return strangers | {thread: known.sock for thread, known in self._known.items()}


def cut(sock: socket.socket) -> None:
    """End a connection under the thread that waits on it (see Channel.abort)."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _network(host: str) -> bytes:
    """What one party usually has for itself: an IPv4 address, or an IPv6 /64."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.packed
    return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:8]
