"""Malformed frames, counted: what is left to send, and what came of the rest."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter

from sliplm.protocol.channel import Channel

PATIENCE = 15.0
"""Seconds after which a connection that the other side has not closed counts as hanging."""


class Tally:
    """What is left to do, and what came of the rest."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._size = self._left = size
        self.sent: Counter[str] = Counter()
        self.refused = 0
        self.closed_after = 0.0
        self.problems: list[str] = []

    def next(self) -> bool:
        with self._lock:
            if self._left <= 0 or len(self.problems) >= 10:
                return False
            self._left -= 1
            return True

    def refuse(self) -> None:
        """The frame was not sent; another one will be."""
        with self._lock:
            self.refused += 1
            self._left += 1

    @property
    def done(self) -> bool:
        return self._left <= 0 or len(self.problems) >= 10

    @property
    def unsent(self) -> int:
        """How many frames are not known to have been sent."""
        return self._size - self.sent.total()

    def record(self, what: str, seconds: float | None) -> None:
        with self._lock:
            self.sent[what] += 1
            if seconds is None:
                self.problems.append(f"a connection was not closed within {PATIENCE:g} s after {what}")
            else:
                self.closed_after = max(self.closed_after, seconds)


def until_closed(channel: Channel) -> float | None:
    """Say that nothing more will come; the seconds until the other side hangs up, or None if it does not."""
    started = time.monotonic()
    sock = channel._sock
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
    sock.settimeout(PATIENCE)
    try:
        while socket.socket.recv(sock, 1 << 16):  # below TLS: what it says does not matter
            pass
    except TimeoutError:
        return None
    except OSError:
        pass
    return time.monotonic() - started
