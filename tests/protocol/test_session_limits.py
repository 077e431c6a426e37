"""How long a session waits, and for how much: slow, silent and flooding peers, signals, and the end of the process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from link_fakes import server_context
from session_fakes import connected, fill, kind, read, session_of, write

from sliplm._core import native
from sliplm.protocol.openssl import Room
from sliplm.protocol.session import MOST_BYTES, Session

__all__ = ["kind"]  # a fixture


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
