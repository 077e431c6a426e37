"""A channel: frames over one TLS connection, with a time limit on every wait.

A channel belongs to one thread at a time and needs no locks and no queues. The one exception is `abort`, which any
thread may call to make the others stop waiting.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sliplm._core import native
from sliplm.errors import (
    RECEIVED,
    Code,
    IdentityError,
    InternalError,
    LinkError,
    SlipError,
)
from sliplm.protocol import frames, tls
from sliplm.protocol.frames import HEADER, Header, Kind
from sliplm.protocol.session import Session

SPIN_MICROSECONDS = 2e3
"""So long an edge asks again and again whether the next question is there before it sleeps: waking up costs more than
most exchanges take. It gives way to whoever else wants the core."""

SHORT_MICROSECONDS, LONG_MICROSECONDS = 400.0, 3000.0
"""The trusted side, whose core is the dear one, sleeps until shortly before it expects an answer, and then asks again
and again for SHORT_MICROSECONDS at most. Where it expects to wait for longer than LONG_MICROSECONDS, it only sleeps:
being woken late costs little then."""

DRAIN_SECONDS = 1.0
READ_BYTES = 1 << 15
RECORD_BYTES = 1 << 14
"""TLS takes and delivers that much at a time."""

SLOWEST = 1e6
"""Bytes per second below which a peer that keeps sending is given up nevertheless."""


class Arrival:
    """A frame that is on its way: its header must be `header`, its payload goes into the C-contiguous array `into`."""

    __slots__ = ("array", "begun", "done", "header", "view")

    def __init__(self, header: tuple[int, ...], into: NDArray[np.uint32]) -> None:
        self.header, self.array = header, into
        self.view = into.data.cast("B")
        self.begun = False
        self.done = 0  # bytes of the payload

    @property
    def complete(self) -> bool:
        return self.done == len(self.view)


class Channel:
    """Frames over a TLS session, which the channel owns from now on.

    `timeout` (seconds) limits how long the peer may be silent, and how long a header may take; a payload may take
    that long plus a second per megabyte. All methods raise LinkError when the connection fails, and ProtocolError
    when the peer breaks the rules; after either the channel can only be closed.

    Frames of exchanges take as few Python calls as they can: more of them would cost more than the arithmetic.
    """

    def __init__(self, session: Session, peer: str, timeout: float) -> None:
        self.peer = peer
        self.version = 0
        self._session = session
        self._sock = session.socket
        self._in = memoryview(bytearray(READ_BYTES))
        self._header = self._in[: HEADER.size]
        self._start = self._end = 0  # the part of `_in` that has not been used yet
        self._out = np.empty(READ_BYTES, np.uint8)
        self._staged: dict[tuple[int, int], NDArray[np.uint32]] = {}
        self.set_timeout(timeout)

    def set_timeout(self, timeout: float) -> None:
        self.timeout = timeout
        self._session.set_timeout(timeout)

    # --- sending --------------------------------------------------------------------------------------------

    def stage(self, rows: int, cols: int) -> NDArray[np.uint32]:
        """Room for the payload of the next frame, a (rows, cols) array: fill it, then call `send_staged`.

        It lies behind the room for the header, so that both leave in one write without another copy.
        """
        staged = self._staged.get((rows, cols))
        if staged is None:
            size = HEADER.size + 4 * rows * cols
            if self._out.size < size or len(self._staged) > 64:
                self._staged.clear()  # they are views of the old buffer
                self._out = np.empty(max(size, self._out.size), np.uint8)
            staged = self._out[HEADER.size : size].view(np.uint32).reshape(rows, cols)
            self._staged[rows, cols] = staged
        return staged

    def send_staged(self, kind: Kind, group: int, sequence: int, staged: NDArray[np.uint32]) -> None:
        """Send the array that `stage` returned."""
        size = 4 * staged.size
        HEADER.pack_into(self._out.data, 0, kind, self.version, group, len(staged), sequence, size)
        data = self._out.data[: HEADER.size + size]
        try:
            done = self._session.write(data)
        except (OSError, ValueError) as error:
            self._fail(error)
        if done < len(data):
            self._write(data[done:])

    def send_array(
        self, kind: Kind, group: int, sequence: int, array: NDArray[np.uint32], take: Callable[[], bool]
    ) -> None:
        """Send a C-contiguous array (rows, cols), and whenever that would have to wait, `take` what is there to read.

        Without this, two sides that both wait for the other to read would wait for ever. `take` must not wait; it tells
        whether there is more to come. The peer's time is that for a payload of this size, and it must read all.
        """
        header = HEADER.pack(kind, self.version, group, len(array), sequence, array.nbytes)
        data = array.data.cast("B")
        begin = RECORD_BYTES - HEADER.size
        deadline = time.monotonic() + self.timeout + array.nbytes / SLOWEST
        self._session.set_timeout(0)
        self._write_by_turns(header + bytes(data[:begin]), take, deadline)
        self._write_by_turns(data[begin:], take, deadline)
        self._session.set_timeout(self.timeout)

    def _write_by_turns(self, data: bytes | memoryview, take: Callable[[], bool], deadline: float) -> None:
        done = 0
        while done < len(data) or self._session.unsent:
            try:
                if done < len(data):
                    done += self._session.write(data[done:])
                else:
                    self._session.flush()
            except BlockingIOError:
                self._wait(select.POLLOUT | (select.POLLIN if take() else 0), deadline)
            except (OSError, ValueError) as error:
                self._fail(error)

    def _wait(self, events: int, deadline: float) -> None:
        """Until the socket is ready for one of `events`, or broken."""
        poll = select.poll()
        try:
            poll.register(self._sock.fileno(), events)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1e3):  # a peer that trickles is always ready
                raise TimeoutError
        except (OSError, ValueError) as error:
            self._fail(error)

    def send(self, kind: Kind, payload: bytes = b"", *, group: int = 0, rows: int = 0, sequence: int = 0) -> None:
        """Send a frame without an array of field elements."""
        self._write(HEADER.pack(kind, self.version, group, rows, sequence, len(payload)) + payload)

    def send_error(self, code: Code, sentence: str, sequence: int = 0) -> None:
        """Send an ERROR; `sentence` must hold no secret."""
        self.send(Kind.ERROR, frames.clean(sentence).encode(), group=code, sequence=sequence)

    def tell(self, error: Exception) -> None:
        """Send the ERROR that stands for `error`; of what is none of the other side's business, it says just that."""
        known = error if isinstance(error, SlipError) else InternalError()
        self.send_error(known.code, known.told or str(known), known.retry_after or 0)

    def _write(self, data: bytes | memoryview) -> None:
        done = 0
        try:
            while done < len(data):  # piece by piece, because the timeout holds for one call
                done += self._session.write(data[done:])
        except (OSError, ValueError) as error:
            self._fail(error)

    # --- receiving ------------------------------------------------------------------------------------------

    def receive(self, spin: bool = False) -> Header:
        """The next frame's header, valid and within the limits. Its payload must be read next. With `spin`, wait
        without sleeping at first, see `await_input`."""
        deadline = time.monotonic() + self.timeout
        if self._end == self._start:
            try:
                if spin and native is not None and not self._session.waiting:
                    native.wait_readable(self._sock.fileno(), 0, SPIN_MICROSECONDS)
                self._start, self._end = 0, self._session.read(self._in)
            except (OSError, ValueError) as error:
                self._fail(error)
        if self._end - self._start < HEADER.size:
            self._fetch_header(deadline)
        start = self._start
        self._start = start + HEADER.size
        return frames.parse_header(self._in[start : self._start], self.version)

    def comes(self, header: tuple[int, ...]) -> bool:
        """Whether the next frame has exactly this header; it is then done with. Otherwise, `receive` it."""
        if self._end == self._start:
            # What follows a header that comes alone goes where it belongs, and not through this buffer.
            try:
                self._start, self._end = 0, self._session.read(self._in if header[-1] < READ_BYTES else self._header)
            except (OSError, ValueError) as error:
                self._fail(error)
        if self._end - self._start < HEADER.size:
            self._fetch_header(time.monotonic() + self.timeout)
        if HEADER.unpack_from(self._in, self._start) != header:
            return False
        self._start += HEADER.size
        return True

    def advance(self, arrival: Arrival) -> bool:
        """Read some more of a frame that is not complete, once; whether there was more. False as well if its header is
        another one: `receive` that."""
        count = 0
        if not arrival.begun:
            left = self._end - self._start
            if left < HEADER.size:
                self._in[:left] = self._in[self._start : self._end]
                count = self._receive_some(self._in[left:])
                self._start, self._end = 0, left + count
                if self._end < HEADER.size:
                    return count > 0
            if HEADER.unpack_from(self._in, self._start) != arrival.header:
                return False
            self._start += HEADER.size
            arrival.begun = True
        done = arrival.done
        if self._end > self._start:  # what came along with the header
            count = min(len(arrival.view) - done, self._end - self._start)
            arrival.view[done : done + count] = self._in[self._start : self._start + count]
            self._start += count
        else:
            count = self._receive_some(arrival.view[done:])
        arrival.done += count
        return count > 0

    @property
    def has_header(self) -> bool:
        """Whether a whole header lies in the buffer."""
        return self._end - self._start >= HEADER.size

    def await_input(self, expected: float) -> None:
        """Wait for input that is expected in so many microseconds, for at most a second more; whether there is any will
        show when it is read."""
        if native is None or self._end > self._start:
            return
        try:
            if self._session.waiting:
                return
            handle = self._sock.fileno()
            if expected > LONG_MICROSECONDS or not native.wait_readable(handle, expected, SHORT_MICROSECONDS):
                native.wait_readable(handle, 1e6, 0)
        except (OSError, ValueError) as error:
            self._fail(error)

    def has_input(self) -> bool:
        """Whether something is there to receive. Does not wait."""
        if self._end > self._start:
            return True
        try:
            return self._session.waiting or bool(select.select([self._sock], [], [], 0)[0])
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fetch_header(self, deadline: float) -> None:
        left = self._end - self._start
        self._in[:left] = self._in[self._start : self._end]
        self._start, self._end = 0, left
        while self._end < HEADER.size:
            try:
                count = self._session.read(self._in[self._end :])
            except (OSError, ValueError) as error:
                self._fail(error)
            if not count:
                raise LinkError(f"{self.peer} closed the connection")
            self._end += count
            if self._end < HEADER.size and time.monotonic() > deadline:
                self._fail(TimeoutError())

    def read(self, header: Header) -> bytes:
        """The payload of a frame, whose length the caller has checked. Without an array, it is at most 1 MiB."""
        data = bytearray(header.length)
        self._read(memoryview(data))
        return bytes(data)

    def read_array(self, into: NDArray[Any]) -> None:
        """Read a payload into a C-contiguous array, whose size the caller has compared with the header."""
        view = into.data.cast("B")
        size, start = len(view), self._start
        if self._end - start < size:
            self._read(view)
        else:  # all of it came along with the header
            self._start = start + size
            view[:] = self._in[start : self._start]

    def read_error(self, header: Header) -> SlipError:
        """The exception that stands for an ERROR frame."""
        sentence = frames.clean(self.read(header).decode("utf-8", "replace")) or "the other side gave no reason"
        error = RECEIVED.get(header.group, LinkError)(sentence)
        error.retry_after = header.sequence or None
        return error

    def _read(self, view: memoryview) -> None:
        size = len(view)
        done = min(size, self._end - self._start)  # what came along with the header
        view[:done] = self._in[self._start : self._start + done]
        self._start += done
        if done == size:
            return
        deadline = time.monotonic() + self.timeout + size / SLOWEST
        try:
            if self._session.fill(view[done:], deadline) < size - done:
                raise LinkError(f"{self.peer} closed the connection")
        except (OSError, ValueError) as error:
            self._fail(error)

    def _receive_some(self, view: memoryview) -> int:
        """At least one byte, up to RECORD_BYTES; of a socket that does not wait, maybe none."""
        try:
            count: int = self._session.read(view)
        except BlockingIOError:
            return 0
        except (OSError, ValueError) as error:
            self._fail(error)
        if not count:
            raise LinkError(f"{self.peer} closed the connection")
        return count

    def peer_left(self) -> bool:
        """Whether the peer closed the connection, or spoke although it was not its turn. Does not wait."""
        try:
            self._session.set_timeout(0)
            self._session.read(memoryview(bytearray(1)))
            return True
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True
        finally:
            with contextlib.suppress(OSError):
                self._session.set_timeout(self.timeout)

    def _fail(self, error: Exception) -> NoReturn:
        if isinstance(error, TimeoutError):
            raise LinkError(f"{self.peer} did not answer within {self.timeout:g} s") from None
        if isinstance(error, ssl.SSLError):
            raise tls.explain(error, self.peer) from None
        raise LinkError(f"the connection to {self.peer} was lost") from None

    # --- ending ---------------------------------------------------------------------------------------------

    def certificate(self) -> bytes:
        """The peer's certificate in DER form."""
        der = self._session.certificate()
        if not der:
            raise IdentityError(f"{self.peer} has no certificate")
        return der

    def abort(self) -> None:
        """Cut the connection, from any thread; whoever waits on the channel gets a LinkError at once.

        This shuts down TCP, below TLS, whose state is the other thread's.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self, drain: bool = False) -> None:
        """Close. With `drain`, first let the peer read what was sent last: closing a socket with unread input
        resets the connection, and the peer would lose the ERROR that says why."""
        if drain:
            drain_socket(self._sock)
        self._sock.close()

    def __repr__(self) -> str:
        return f"Channel({self.peer})"


def drain_socket(sock: socket.socket) -> None:
    """Say that nothing more will be sent, then swallow what still arrives, for at most a second."""
    deadline = time.monotonic() + DRAIN_SECONDS
    try:
        sock.shutdown(socket.SHUT_WR)  # below TLS, see Channel.abort
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(1 << 16):
                break
    except (OSError, ValueError):
        pass
