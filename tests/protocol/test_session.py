"""TLS through memory, against Python's own sockets at the other end."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from link_fakes import python_context, server_context

from sliplm.protocol import tls
from sliplm.protocol.openssl import Room
from sliplm.protocol.session import MOST_BYTES, Session


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
    session = Session(here, server_context(home))
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
            assert exactly(ours, sum(sizes)) == b"".join(data)
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
        ours.socket.settimeout(0)
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
        ours.socket.settimeout(0.5)
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
            Session(here, server_context(home))
        assert time.monotonic() - begin < 2
        over.set()
        thread.join(10)


@pytest.mark.parametrize("how", [read, fill])
def test_records_without_data_end_a_session(
    home: Path, identity: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    """Such as ask for new keys: each would be answered, into memory, and none be the end of a wait."""
    with connected(home, identity) as (ours, theirs):

        class Updates:
            room, over, came, answers = Room(1 << 14), False, 0, 0

            def receive(self, _: object, count: int) -> int:
                self.came += count
                return count

            def received(self) -> int:
                return self.came

            def pending(self) -> int:
                return 0

            def to_send(self) -> int:
                return self.answers

            def read(self, into: memoryview) -> None:
                self.answers, self.came = self.answers + self.came // 27 * 27, self.came % 27

        monkeypatch.setattr(ours, "_tls", updates := Updates())

        def flood() -> None:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    socket.socket.send(theirs, bytes(1 << 14))

        thread = threading.Thread(target=flood)
        thread.start()
        with pytest.raises(OSError, match="the peer"):
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
