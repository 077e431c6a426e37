"""TLS through memory, against Python's own sockets at the other end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from link_fakes import python_context, server_context

from sliplm._core import native
from sliplm.protocol import openssl, tls
from sliplm.protocol.openssl import Room
from sliplm.protocol.session import MOST_BYTES, NativeSession, Session

SESSIONS = [Session, NativeSession] if openssl.FUNCTIONS else [Session]


@pytest.fixture(params=SESSIONS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test here is of both."""
    monkeypatch.setattr(sys.modules[__name__], "session_of", request.param)
    return request.param


def session_of(sock: socket.socket, context: openssl.Context) -> Session:
    raise NotImplementedError  # see `kind`


@contextlib.contextmanager
def connected(home: Path, identity: Path) -> Iterator[tuple[Session, ssl.SSLSocket]]:
    """Our end, the trusted side's, and the edge's as Python makes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname(), 10)
        here = listener.accept()[0]
    here.settimeout(10)
    made: list[Any] = []
    context = python_context(identity)
    thread = threading.Thread(target=lambda: made.append(context.wrap_socket(there, server_hostname=tls.SERVER_NAME)))
    thread.start()
    session = session_of(here, server_context(home))
    thread.join(10)
    with here, made[0]:
        yield session, made[0]


def read(session: Session, seconds: float) -> int:
    return session.read(memoryview(bytearray(1)))


def fill(session: Session, seconds: float) -> int:
    return session.fill(memoryview(bytearray(1)), time.monotonic() + seconds)


def exactly(session: Session, size: int) -> bytes:
    data, done = memoryview(bytearray(size)), 0
    while done < size:
        count = session.read(data[done:])
        assert count
        done += count
    return bytes(data)


def test_bytes_of_any_number_come_as_they_were_sent(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):

        @settings(max_examples=30, deadline=None)
        @given(st.lists(st.integers(1, 3 * MOST_BYTES) | st.integers(1, 40), min_size=1, max_size=4), st.randoms())
        def both_ways(sizes: list[int], rng: random.Random) -> None:
            data = [rng.randbytes(size) for size in sizes]
            thread = threading.Thread(target=lambda: [theirs.sendall(piece) for piece in data])
            thread.start()
            got = bytearray(sum(sizes))
            if rng.random() < 0.5:
                assert ours.fill(memoryview(got), time.monotonic() + 10) == len(got)
            else:
                got[:] = exactly(ours, len(got))
            assert got == b"".join(data)
            thread.join(10)
            thread = threading.Thread(target=lambda: [write(ours, piece) for piece in data])
            thread.start()
            got = b""
            while len(got) < sum(sizes):
                got += theirs.recv(1 << 20)
            thread.join(10)
            assert got == b"".join(data) and not ours.waiting and not ours.unsent

        both_ways()


def write(session: Session, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += session.write(memoryview(data)[done:])


def test_a_socket_that_does_not_wait_keeps_what_it_has_no_room_for(home: Path, identity: Path) -> None:
    data = random.Random(0).randbytes(20 << 20)
    with connected(home, identity) as (ours, theirs):
        ours.set_timeout(0)
        with pytest.raises(BlockingIOError):
            ours.read(memoryview(bytearray(1)))
        done = 0
        with pytest.raises(BlockingIOError):
            while True:
                done += ours.write(memoryview(data)[done:])
        assert ours.unsent and done < len(data)
        got = b""
        while len(got) < done:
            got += theirs.recv(1 << 20)
            with contextlib.suppress(BlockingIOError):
                ours.flush()
        assert got == data[:done] and not ours.unsent


def test_the_end_is_the_end_also_within_a_record(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):
        theirs.sendall(b"all")
        socket.socket.shutdown(theirs, socket.SHUT_WR)
        assert exactly(ours, 3) == b"all"
        with pytest.raises(ssl.SSLEOFError):
            ours.read(memoryview(bytearray(1)))
    with connected(home, identity) as (ours, theirs):
        theirs.settimeout(1)
        with contextlib.suppress(OSError):
            theirs.unwrap()  # says that it ends, and would wait for us to
        assert ours.read(memoryview(bytearray(1))) == 0
    with connected(home, identity) as (ours, theirs):
        socket.socket.send(theirs, bytes([23, 3, 3, 0, 100]) + bytes(50))  # a record that stops in its middle
        socket.socket.shutdown(theirs, socket.SHUT_WR)
        with pytest.raises(ssl.SSLError):
            ours.read(memoryview(bytearray(1)))


def test_a_payload_of_many_records_is_whole_or_cut(home: Path, identity: Path) -> None:
    data = bytes(range(256)) * 1000
    with connected(home, identity) as (ours, theirs):
        thread = threading.Thread(target=theirs.sendall, args=(data,))
        thread.start()
        got = bytearray(len(data))
        assert ours.fill(memoryview(got), time.monotonic() + 10) == len(data) and got == data
        thread.join(10)
        theirs.settimeout(1)
        theirs.sendall(data[:20_000])
        with contextlib.suppress(OSError):
            theirs.unwrap()
        got = bytearray(len(data))
        assert ours.fill(memoryview(got), time.monotonic() + 10) == 20_000 and got[:20_000] == data[:20_000]


def test_what_was_changed_on_its_way_is_refused(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):
        socket.socket.send(theirs, bytes([23, 3, 3, 0, 50]) + bytes(50))
        with pytest.raises(ssl.SSLError):
            ours.read(memoryview(bytearray(1)))


def test_a_session_shows_no_secret(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):
        assert repr(ours) == "Session(<secret>)"
        own, *_ = x509.load_pem_x509_certificates(identity.read_bytes())
        assert ours.certificate() == own.public_bytes(Encoding.DER)
        assert theirs.version() == "TLSv1.3"


@pytest.mark.parametrize("how", [read, fill])
def test_a_peer_that_trickles_has_no_more_time_than_a_silent_one(home: Path, identity: Path, how: Any) -> None:
    with connected(home, identity) as (ours, theirs):
        ours.set_timeout(0.5)
        over = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in bytes([23, 3, 3, 64, 0]) + bytes(100):
                    socket.socket.send(theirs, bytes([byte]))
                    if over.wait(0.1):
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            how(ours, 0.5)
        assert time.monotonic() - begin < 2
        over.set()
        thread.join(10)


def test_a_stranger_that_trickles_has_no_more_time_for_its_handshake(home: Path) -> None:
    here, there = socket.socketpair()
    over = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            for byte in bytes([22, 3, 1, 2, 0, 1, 0, 1, 252]) + bytes(100):
                there.send(bytes([byte]))
                if over.wait(0.1):
                    return

    with here, there:
        here.settimeout(0.5)
        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            session_of(here, server_context(home))
        assert time.monotonic() - begin < 2
        over.set()
        thread.join(10)


class Updates:
    """A TLS session whose peer asks for new keys all the time, which is answered if it wants that, and sends a byte of
    data among that if it has any. Python's TLS cannot do it."""

    room, over, came, answers = Room(1 << 14), False, 0, 0

    def __init__(self, answered: bool, data: bool) -> None:
        self.answered, self.data = answered, data

    def receive(self, _: object, count: int) -> int:
        self.came += count
        return count

    def received(self) -> int:
        return self.came

    def pending(self) -> int:
        return 0

    def to_send(self) -> int:
        return self.answers

    def read(self, into: memoryview) -> int | None:
        self.answers += self.answered * (self.came // 27 * 27)
        self.came = 0 if self.data else self.came % 27
        return 1 if self.data else None

    def records(self) -> Any:
        """The same as functions of OpenSSL's."""
        into, out, want_read = 1, 2, 2

        def function(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
            return ctypes.CFUNCTYPE(result, *arguments)

        def ssl_read(_: int, __: int, ___: int) -> int:
            return self.read(memoryview(b"")) or -1

        some = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        self.functions = [
            function(ctypes.c_int, *some)(ssl_read),
            function(ctypes.c_int, *some)(lambda *_: -1),
            function(ctypes.c_int, ctypes.c_void_p)(lambda _: 0),
            function(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(lambda *_: want_read),
            function(ctypes.c_int, *some)(lambda *_: -1),
            function(ctypes.c_int, *some)(self.receive_it),
            function(ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(
                lambda bio, _: {into: self.came, out: self.answers}[bio]
            ),
            function(None)(lambda: None),
        ]
        assert native is not None
        addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self.functions]
        return native.Records(self, 0, into, out, addresses)

    def receive_it(self, _: object, __: object, count: int) -> int:
        return self.receive(None, count)


@pytest.mark.parametrize(("answered", "data"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("how", [read, fill])
def test_records_without_data_end_a_session(
    home: Path, identity: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, how: Any, answered: bool, data: bool
) -> None:
    """Such as ask for new keys: each would be answered, into memory, and none be the end of a wait."""
    with connected(home, identity) as (ours, theirs):
        updates = Updates(answered, data)
        if kind is Session:
            monkeypatch.setattr(ours, "_tls", updates)
        else:
            monkeypatch.setattr(ours, "_records", updates.records())

        def flood() -> None:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    socket.socket.send(theirs, bytes(1 << 14))

        thread = threading.Thread(target=flood)
        thread.start()
        with pytest.raises(OSError, match="the peer"):
            while True:
                how(ours, 10.0)
        assert updates.to_send() < 2 * MOST_BYTES
        ours.socket.close()
        thread.join(10)


def test_a_session_that_failed_is_garbage_like_any_other(
    home: Path, identity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was still lent to the cipher when the collector found it made Python crash."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    class Holder:
        error: Exception

    def fail(session: Session, into: memoryview, holder: Holder) -> None:
        try:
            session.read(into)
        except ssl.SSLError as error:
            holder.error = error

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            with connected(home, identity) as (ours, theirs):
                socket.socket.send(theirs, bytes([23, 3, 3, 0, 50]) + bytes(50))
                for _ in range(2):  # it fails again the same way
                    fail(ours, memoryview(bytearray(10)), holder := Holder())
                    assert "DECRYPTION_FAILED" in str(getattr(holder.error, "reason", ""))
            del ours, theirs, holder
        gc.collect()
    finally:
        gc.enable()
    assert not unraisable


def test_what_came_with_data_shows_after_it(home: Path, identity: Path) -> None:
    """The end, or what is wrong, in the same piece as data: nobody sleeps on it, and a write says why it cannot be."""
    room = memoryview(bytearray(100))
    with connected(home, identity) as (ours, theirs):
        theirs.settimeout(0.2)
        theirs.sendall(b"all")
        with contextlib.suppress(OSError):
            theirs.unwrap()
        assert ours.read(room) == 3 and ours.waiting and ours.read(room) == 0
    with connected(home, identity) as (ours, theirs):
        theirs.sendall(b"all")
        socket.socket.send(theirs, bytes([23, 3, 3, 0, 50]) + bytes(50))
        time.sleep(0.05)
        assert ours.read(room) == 3 and ours.waiting
        for use in (lambda: ours.write(b"x"), lambda: ours.read(room)):
            with pytest.raises(ssl.SSLError) as caught:
                use()
            assert "BAD_RECORD_MAC" in str(caught.value.reason)
    with connected(home, identity) as (ours, theirs):
        theirs.sendall(b"all")
        for wrong in (memoryview(b"for reading only"), room[:0]):
            with pytest.raises((BufferError, ValueError)):
                ours.read(wrong)


def relay(source: socket.socket, target: socket.socket, rng: random.Random) -> None:
    """All that comes, in pieces of any size with pauses between some of them."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 20):
            while data:
                piece, data = data[: (size := rng.choice([1, 5, 700, 16_000, 17_000, 100_000]))], data[size:]
                target.sendall(piece)
                time.sleep(rng.choice([0, 0, 0, 0.001]))
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_may_be_cut_anywhere_on_its_way(home: Path, identity: Path, seed: int) -> None:
    """Whoever waits for many bytes at once must not wait for more than are to come."""
    rng = random.Random(seed)
    (here, near), (there, far) = socket.socketpair(), socket.socketpair()
    here.settimeout(10)
    there.settimeout(10)
    context, made = python_context(identity), list[ssl.SSLSocket]()
    threads = [
        threading.Thread(target=relay, args=(near, far, rng)),
        threading.Thread(target=relay, args=(far, near, rng)),
        threading.Thread(target=lambda: made.append(context.wrap_socket(there, server_hostname=tls.SERVER_NAME))),
    ]
    for thread in threads:
        thread.start()
    ours = session_of(here, server_context(home))
    threads[2].join(10)
    with here, near, far, made[0] as theirs:
        for size in (1, 16_384, 16_385, 3 * 16_384 - 1, 65_536 + 16_640, 400_000):
            data = rng.randbytes(size)
            sender = threading.Thread(target=theirs.sendall, args=(data,))
            sender.start()
            got = bytearray(size)
            assert ours.fill(memoryview(got), time.monotonic() + 10) == size and got == data
            sender.join(10)
            sender = threading.Thread(target=write, args=(ours, data))
            sender.start()
            received = b""
            while len(received) < size:
                received += theirs.recv(1 << 20)
            assert received == data
            sender.join(10)
        here.shutdown(socket.SHUT_RDWR)
        socket.socket.shutdown(theirs, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


def test_a_peer_that_does_not_read_has_no_more_time(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, _):
        ours.set_timeout(0.3)
        with pytest.raises(TimeoutError):
            write(ours, bytes(50 << 20))
        for size in (1, 1 << 20):
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                ours.fill(memoryview(bytearray(size)), begin + 10)
            assert time.monotonic() - begin < 5


def test_a_connection_that_was_reset_is_an_error(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        time.sleep(0.05)
        with pytest.raises(ConnectionResetError):
            ours.read(memoryview(bytearray(1)))
        with pytest.raises(BrokenPipeError):
            write(ours, b"x")


def test_a_socket_that_was_closed_is_nobody_elses(home: Path, identity: Path) -> None:
    """Its number may be another one's by now."""
    with connected(home, identity) as (ours, theirs):
        theirs.sendall(b"secret")
        number = ours.socket.fileno()
        ours.socket.close()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.setblocking(False)
            assert number in (here.fileno(), there.fileno())
            there.sendall(b"of others")
            here.sendall(b"of others")
            for use in (
                lambda: ours.read(memoryview(bytearray(1))),
                lambda: ours.fill(memoryview(bytearray(1)), time.monotonic() + 1),
                lambda: write(ours, b"x"),
            ):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    use()
            assert here.recv(100) == there.recv(100) == b"of others"


@pytest.mark.parametrize("use", [fill, lambda session, _: write(session, bytes(50 << 20))])
def test_signals_are_handled_and_give_nobody_more_time(home: Path, identity: Path, use: Any) -> None:
    class Stop(Exception):
        pass

    seen: list[int] = []

    def handle(number: int, _: Any) -> None:
        seen.append(number)
        if len(seen) == 20:
            raise Stop

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with connected(home, identity) as (ours, _):
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            ours.set_timeout(0.3)
            with pytest.raises(TimeoutError):
                use(ours, 10)
            assert 3 < len(seen) < 20
            ours.set_timeout(10)
            with pytest.raises(Stop):
                use(ours, 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("end", ["says so", "wrong record", "closes", "goes on"])
def test_whoever_waits_for_many_bytes_sees_what_comes_instead(home: Path, identity: Path, end: str) -> None:
    data = bytes(range(250)) * 600
    with connected(home, identity) as (ours, theirs):
        ours.set_timeout(1)
        theirs.settimeout(0.1)

        def send() -> None:
            theirs.sendall(data[:20_000])
            time.sleep(0.1)
            if end == "says so":
                with contextlib.suppress(OSError):
                    theirs.unwrap()
            elif end == "wrong record":
                socket.socket.send(theirs, bytes([23, 3, 3, 0, 50]) + bytes(50))
            elif end == "closes":
                socket.socket.shutdown(theirs, socket.SHUT_WR)
            else:  # slower than a piece at a time, and never silent for long
                for start in range(20_000, len(data), 20_000):
                    time.sleep(0.4)
                    theirs.sendall(data[start : start + 20_000])

        thread = threading.Thread(target=send)
        thread.start()
        into, begin = memoryview(bytearray(len(data))), time.monotonic()
        if end == "says so":
            assert ours.fill(into, begin + 10) == 20_000
        elif end == "goes on":
            assert ours.fill(into, begin + 10) == len(data) and into == data
        else:
            for _ in range(2):
                with pytest.raises(ssl.SSLError) as caught:
                    ours.fill(into, begin + 10)
                assert ("EOF" if end == "closes" else "BAD_RECORD_MAC") in str(caught.value.reason)
        thread.join(10)


def test_a_deadline_holds_also_while_bytes_keep_coming(home: Path, identity: Path) -> None:
    with connected(home, identity) as (ours, theirs):
        theirs.sendall(b"x")
        time.sleep(0.05)
        with pytest.raises(TimeoutError):
            ours.fill(memoryview(bytearray(1)), time.monotonic() - 1)


def test_a_thread_that_reads_does_not_disturb_the_end_of_the_process(home: Path, identity: Path, kind: Any) -> None:
    program = f"""
import socket, threading, time
from sliplm.protocol import session, tls

def read():
    while True:
        of.fill(memoryview(bytearray(100_000)), time.monotonic() + 30)

of = session.{kind.__name__}(socket.create_connection(("127.0.0.1", PORT)), tls.client_context({str(identity)!r}))
threading.Thread(target=read, daemon=True).start()
time.sleep(0.3)
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = program.replace("PORT", str(listener.getsockname()[1]))
        child = subprocess.Popen([sys.executable, "-c", program])
        here = listener.accept()[0]
    here.settimeout(30)
    with here, contextlib.suppress(OSError):
        ours = session_of(here, server_context(home))
        while True:
            write(ours, bytes(1 << 20))
    assert child.wait(30) == 0
