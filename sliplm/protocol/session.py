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
from typing import Any

from sliplm.protocol.tls import SERVER_NAME

WRITE_BYTES = 1 << 16
READ_BYTES, MOST_BYTES = 1 << 14, 1 << 18
"""So much is written at a time, and read: little at first, as most connections carry no more."""

EMPTY_BYTES = 1 << 16
"""More than a record, which is what may come before the next byte of data."""
EMPTY = "the peer sends records without data"


class Session:
    """The TLS session of `sock`, which it owns from now on, after the handshake; the time limits are the socket's.

    Raises ssl.SSLError and OSError, here and everywhere. A socket that does not wait raises BlockingIOError.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool = False) -> None:
        self.socket = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else SERVER_NAME
        wrapped: Any = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=name)
        self._tls = wrapped._sslobj  # without the calls that Python's own wrapper adds to each of ours
        self._room = memoryview(bytearray(READ_BYTES))
        self._unsent = b""
        deadline = self._deadline()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send()
                self._fetch(deadline)
                continue
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._send()  # the alert that tells the peer what is wrong
                raise
            self._send()
            return

    def __repr__(self) -> str:
        return "Session(<secret>)"

    def certificate(self) -> bytes | None:
        """The peer's in DER form."""
        der: bytes | None = self._tls.getpeercert(True)
        return der

    @property
    def waiting(self) -> bool:
        """Whether something has been received that was not read; it may be less than a record."""
        return bool(self._in.pending or self._tls.pending())

    @property
    def unsent(self) -> bool:
        """Whether something was written that the socket had no room for; `flush` sends it."""
        return bool(self._unsent)

    def read(self, size: int, into: memoryview) -> int:
        """Up to `size` bytes, and at least one; 0 at the end."""
        if not self._in.pending and not self._tls.pending():
            self._fetch()
        deadline, left = None, EMPTY_BYTES
        while True:
            try:
                count: int = self._tls.read(size, into)
                return count
            except ssl.SSLWantReadError:  # of a record a part is here
                if left <= 0:
                    raise OSError(EMPTY) from None
                if deadline is None:
                    deadline = self._deadline()
                left -= self._fetch(deadline)

    def fill(self, into: memoryview, deadline: float) -> int:
        """Read until `into` is full, or up to the end; how many bytes. Not for a socket that does not wait. As `read`
        again and again, in one call: of a batch's answer a record takes hardly longer than calls do."""
        read, done, size = self._tls.read, 0, len(into)
        left = EMPTY_BYTES
        while done < size:
            before = done
            try:
                while done < size:
                    count: int = read(size - done, into[done:])
                    if not count:
                        return done
                    done += count
            except ssl.SSLWantReadError:
                left = EMPTY_BYTES if done > before else left
                if left <= 0:
                    raise OSError(EMPTY) from None
                left -= self._fetch(deadline)
        return done

    def write(self, data: memoryview | bytes) -> int:
        """Take the first bytes of `data`, how many, and send them. On a socket that does not wait, they may stay
        `unsent`; nothing more is taken as long as some do."""
        if self._unsent:
            self.flush()
        count: int = self._tls.write(data[:WRITE_BYTES])
        self._unsent = sealed = self._out.read()
        try:
            self._unsent = sealed[self.socket.send(sealed) :]
            if self._unsent:
                self.flush()
        except BlockingIOError:
            pass
        return count

    def flush(self) -> None:
        """Send what is unsent."""
        while self._unsent:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def _send(self) -> None:
        self._unsent = self._out.read()
        self.flush()

    def _deadline(self) -> float:
        """For what may take many waits, each within the socket's limit: a peer that trickles has no more time than one
        that is silent."""
        return time.monotonic() + (self.socket.gettimeout() or math.inf)

    def _fetch(self, deadline: float | None = None) -> int:
        """Receive something; how many bytes."""
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        if self._out.pending > WRITE_BYTES:  # what TLS answers by itself leaves with the next write
            raise OSError("the peer asks for new keys again and again")
        count = self.socket.recv_into(self._room)
        if not count:
            self._in.write_eof()
            return 0
        self._in.write(self._room[:count])
        if count == len(self._room) < MOST_BYTES:
            self._room = memoryview(bytearray(2 * count))
        return count
