"""TLS through memory: bytes, ends and failures, against Python's own sockets at the other end."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import ssl
import struct
import sys
import threading
import time
from operator import eq  # what pytest compares by itself, it explains: for megabytes that takes minutes
from pathlib import Path
from typing import Any

import pytest
import session_fakes
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from link_fakes import python_context, server_context
from session_fakes import connected, kind, session_of, write

from sliplm.protocol import tls
from sliplm.protocol.session import MOST_BYTES, Session, secure

__all__ = ["kind"]  # a fixture


def exactly(session: Session, size: int) -> bytes:
    data, done = memoryview(bytearray(size)), 0
    while done < size:
        count = session.read(data[done:])
        assert count
        done += count
    return bytes(data)


def test_what_links_take_is_the_native_core_s_where_that_reaches_openssl(
    home: Path, identity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_fakes, "_kind", secure)
    with connected(home, identity) as (ours, _):
        assert type(ours) is session_fakes.SESSIONS[-1]


def test_bytes_of_any_number_come_as_they_were_sent(home: Path, identity: Path) -> None:
    # Bytes of a seed, as hypothesis ends an example that draws more than 8 KiB; each on a connection of its own, as one
    # that ends early leaves bytes on it.
    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.integers(1, 3 * MOST_BYTES) | st.integers(1, 40), min_size=1, max_size=4),
        st.integers(0, 2**32),
        st.booleans(),
    )
    def both_ways(sizes: list[int], seed: int, fill: bool) -> None:
        rng = random.Random(seed)
        data = [rng.randbytes(size) for size in sizes]
        with connected(home, identity) as (ours, theirs):
            thread = threading.Thread(target=lambda: [theirs.sendall(piece) for piece in data])
            thread.start()
            got = bytearray(sum(sizes))
            if fill:
                assert ours.fill(memoryview(got), time.monotonic() + 10) == len(got)
            else:
                got[:] = exactly(ours, len(got))
            assert eq(got, b"".join(data))
            thread.join(10)
            thread = threading.Thread(target=lambda: [write(ours, piece) for piece in data])
            thread.start()
            got = b""
            while len(got) < sum(sizes):
                got += theirs.recv(1 << 20)
            thread.join(10)
            assert eq(got, b"".join(data)) and not ours.waiting and not ours.unsent

    both_ways()


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
        assert eq(got, data[:done]) and not ours.unsent


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
        assert ours.fill(memoryview(got), time.monotonic() + 10) == len(data) and eq(got, data)
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
            assert ours.fill(memoryview(got), time.monotonic() + 10) == size and eq(got, data)
            sender.join(10)
            sender = threading.Thread(target=write, args=(ours, data))
            sender.start()
            received = b""
            while len(received) < size:
                received += theirs.recv(1 << 20)
            assert eq(received, data)
            sender.join(10)
        here.shutdown(socket.SHUT_RDWR)
        socket.socket.shutdown(theirs, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


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
