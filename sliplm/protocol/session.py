"""TLS over a connected socket, many records at a time.

`ssl.SSLSocket` asks the system twice for every record of 16 KiB, which costs more than the cipher does. Here one call
moves as many records as there are, through memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import ssl
import time
from typing import NoReturn

from sliplm.protocol.openssl import Context, Room

WRITE_BYTES = 1 << 16
MOST_BYTES = 1 << 18
"""So much is written at a time, and read: less at first, as most connections carry little."""

EMPTY_BYTES = 1 << 16
"""More than a record, which is what may come before the next byte of data."""
EMPTY = "the peer sends records without data"
UPDATES = "the peer asks for new keys again and again"

FAILED, END, SYSTEM, TIMEOUT, WOULD_BLOCK, NO_DATA, KEYS = range(1, 8)
"""What stops the native core (`_core/records.cpp`)."""
WRONG = {NO_DATA: EMPTY, KEYS: UPDATES}


class Session:
    """The TLS session of `sock`, which it owns from now on, after the handshake; its time limits are the socket's.

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

    def set_timeout(self, seconds: float | None) -> None:
        """How long a wait may take: for ever with None, and with 0 nothing waits."""
        self.socket.settimeout(seconds)

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

    def read(self, into: memoryview, deadline: float = math.inf) -> int:
        """Up to as many bytes as there is room for, and at least one; 0 at the end."""
        tls, left = self._tls, EMPTY_BYTES
        while True:
            if tls.over or tls.received() or tls.pending():
                if (count := tls.read(into)) is not None:
                    return count
                if left <= 0:  # of a record, no more than a part is here
                    raise OSError(EMPTY)
                deadline = self._deadline() if math.isinf(deadline) else deadline
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
        Session.flush(self)  # a handshake is always Python's

    def _deadline(self) -> float:
        """For what may take many waits, each within the socket's limit: a peer that trickles has no more time than one
        that is silent."""
        return time.monotonic() + (self.socket.gettimeout() or math.inf)

    def _fetch(self, deadline: float = math.inf) -> int:
        """Receive something; how many bytes."""
        if time.monotonic() > deadline:
            raise TimeoutError
        tls = self._tls
        if tls.to_send() > WRITE_BYTES:  # what TLS answers by itself leaves with the next write
            raise OSError(UPDATES)
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


class NativeSession(Session):
    """The same by the native core, which moves record after record without Python between them. What stops it is judged
    here."""

    def __init__(self, sock: socket.socket, context: Context) -> None:
        super().__init__(sock, context)
        self._records = self._tls.records()
        self.set_timeout(sock.gettimeout())

    def set_timeout(self, seconds: float | None) -> None:
        """See Session."""
        super().set_timeout(seconds)
        self._silence = -1.0 if seconds is None else seconds

    @property
    def waiting(self) -> bool:
        """See Session."""
        return self._tls.over or self._records.waiting

    @property
    def unsent(self) -> bool:
        """See Session."""
        return self._records.unsent

    def read(self, into: memoryview, deadline: float = math.inf) -> int:
        """See Session."""
        if self._tls.over:
            return super().read(into)  # which has a word for it
        count = self._records.read(self.socket.fileno(), into, 1, self._silence, deadline)
        return self._judge(into, count) if self._records.stop else count

    def fill(self, into: memoryview, deadline: float) -> int:
        """See Session."""
        if self._tls.over or not into:
            return super().fill(into, deadline)
        count = self._records.read(self.socket.fileno(), into, len(into), self._silence, deadline)
        if self._records.stop:
            count = self._judge(into, count)
            count += super().fill(into[count:], deadline)  # raises what is wrong
        return count

    def write(self, data: memoryview | bytes) -> int:
        """See Session."""
        if self._tls.over:
            self._tls.check()
        done = self._records.write(self.socket.fileno(), data, self._silence)
        if (stop := self._records.stop) and not (done and stop == WOULD_BLOCK):
            self._raise()
        return done

    def flush(self) -> None:
        """See Session."""
        if not self._records.flush(self.socket.fileno(), self._silence):
            self._raise()

    def _judge(self, into: memoryview, done: int) -> int:
        """What `read` returns after something stopped the native core when `done` bytes were read."""
        stop = self._records.stop
        if stop == FAILED:
            return self._tls.stopped(self._records.result, done) or 0
        if stop == END:
            self._tls.end()
            return done or super().read(into)
        self._raise()

    def _raise(self) -> NoReturn:
        stop = self._records.stop
        if stop == FAILED:
            self._tls.refused(self._records.result)
        if stop == TIMEOUT:
            raise TimeoutError
        if stop == WOULD_BLOCK:
            raise BlockingIOError
        if stop in WRONG:
            raise OSError(WRONG[stop])
        raise OSError(self._records.error, os.strerror(self._records.error))


def secure(sock: socket.socket, context: Context) -> Session:
    """A session by the native core, or else by Python. Raises as Session does."""
    return (NativeSession if context.native else Session)(sock, context)
