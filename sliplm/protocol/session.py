"""TLS over a connected socket, many records at a time.

`ssl.SSLSocket` asks the system twice for every record of 16 KiB, which costs more than the cipher does. Here one call
moves as many records as there are, through memory.
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import time

from sliplm.protocol.openssl import Context, Room

WRITE_BYTES = 1 << 16
MOST_BYTES = 1 << 18
"""So much is written at a time, and read: less at first, as most connections carry little."""

EMPTY_BYTES = 1 << 16
"""More than a record, which is what may come before the next byte of data."""
EMPTY = "the peer sends records without data"


class Session:
    """The TLS session of `sock`, which it owns from now on, after the handshake; the time limits are the socket's.

    Raises ssl.SSLError and OSError, here and everywhere. A socket that does not wait raises BlockingIOError.
    """

    def __init__(self, sock: socket.socket, context: Context) -> None:
        self.socket = sock
        self._tls = context.session()
        self._unsent = memoryview(b"")
        deadline = self._deadline()
        try:
            while not self._tls.handshake():
                self._send()
                self._fetch(deadline)
        except ssl.SSLError:
            with contextlib.suppress(OSError):
                self._send()  # the alert that tells the peer what is wrong
            raise
        self._send()

    def __repr__(self) -> str:
        return "Session(<secret>)"

    def certificate(self) -> bytes | None:
        """The peer's in DER form."""
        return self._tls.certificate()

    @property
    def waiting(self) -> bool:
        """Whether something has been received that was not read: maybe less than a record, maybe the end."""
        tls = self._tls
        return tls.over or tls.received() > 0 or tls.pending() > 0

    @property
    def unsent(self) -> bool:
        """Whether something was written that the socket had no room for; `flush` sends it."""
        return bool(self._unsent)

    def read(self, into: memoryview, deadline: float | None = None) -> int:
        """Up to as many bytes as there is room for, and at least one; 0 at the end."""
        tls, left = self._tls, EMPTY_BYTES
        while True:
            if tls.over or tls.received() or tls.pending():
                if (count := tls.read(into)) is not None:
                    return count
                if left <= 0:  # of a record, no more than a part is here
                    raise OSError(EMPTY)
                deadline = deadline or self._deadline()
            left -= self._fetch(deadline)

    def fill(self, into: memoryview, deadline: float) -> int:
        """Read until `into` is full, or up to the end; how many bytes. Not for a socket that does not wait."""
        done = 0
        while done < len(into) and (count := self.read(into[done:], deadline)):
            done += count
        return done

    def write(self, data: memoryview | bytes) -> int:
        """Take the first bytes of `data`, how many, and send them. On a socket that does not wait, they may stay
        `unsent`; nothing more is taken as long as some do."""
        if self._unsent:
            self.flush()
        some = data[:WRITE_BYTES]
        self._unsent = sealed = self._tls.seal(some)
        try:
            self._unsent = sealed[self.socket.send(sealed) :]
            if self._unsent:
                self.flush()
        except BlockingIOError:
            pass
        return len(some)

    def flush(self) -> None:
        """Send what is unsent."""
        while self._unsent:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def _send(self) -> None:
        self._unsent = self._tls.seal()
        self.flush()

    def _deadline(self) -> float:
        """For what may take many waits, each within the socket's limit: a peer that trickles has no more time than one
        that is silent."""
        return time.monotonic() + (self.socket.gettimeout() or math.inf)

    def _fetch(self, deadline: float | None = None) -> int:
        """Receive something; how many bytes."""
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        tls = self._tls
        if tls.to_send() > WRITE_BYTES:  # what TLS answers by itself leaves with the next write
            raise OSError("the peer asks for new keys again and again")
        room = tls.room
        count = self.socket.recv_into(room.view)
        if not count:
            tls.end()
            return 0
        if tls.receive(room.start, count) != count:
            raise MemoryError
        if count == len(room.view) < MOST_BYTES:
            tls.room = Room(2 * count)
        return count
