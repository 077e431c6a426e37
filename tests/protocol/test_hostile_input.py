"""Hostile input to the server, floods, and limits on connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_fakes import (
    DIGEST,
    FakeEngine,
    ask,
    break_registry,
    enrol,
    python_context,
    refused,
    serving,
    text,
    wait_until,
    working,
)

from sliplm.errors import BusyError, Code, IdentityError, LinkError, RequestError
from sliplm.protocol import channel, frames, tls
from sliplm.protocol.connect import connect
from sliplm.protocol.frames import HEADER, Hello, Kind, Role
from sliplm.serve.connections import Connections
from sliplm.serve.connections import _network as network


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 999, b"\0" * 5000])
def test_garbage_instead_of_tls_disturbs_nobody(home, identity, data):
    with serving(home) as server, working(server, identity) as worker:
        with socket.create_connection(server.address, 10) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
        assert text(worker)


def test_a_silent_peer_is_dropped(home, identity, monkeypatch):
    monkeypatch.setattr("sliplm.serve.greeting.HANDSHAKE_SECONDS", 0.2)
    with serving(home) as server, socket.create_connection(server.address, 10) as sock:
        assert sock.recv(1) == b""
        context = python_context(identity)
        with context.wrap_socket(socket.create_connection(server.address, 10), server_hostname="sliplm-trusted") as s:
            while data := s.recv(4096):  # the handshake is done, and HELLO does not come
                assert b"did not answer" in data


@pytest.fixture
def live(home, identity):
    with serving(home) as server, working(server, identity) as worker:
        yield server, worker, tls.client_context(identity)


SMALL = st.integers(0, 2)
PLAUSIBLE = st.builds(HEADER.pack, st.integers(0, 11), SMALL, SMALL, SMALL, SMALL, st.sampled_from([0, 40, 2**31]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=100) | PLAUSIBLE, st.booleans())
def test_garbage_in_frames_disturbs_nobody(live, identity, data, greet):
    server, worker, _ = live
    context = python_context(identity)
    with context.wrap_socket(socket.create_connection(server.address, 10), server_hostname="sliplm-trusted") as sock:
        if greet:
            hello = frames.pack_hello(Hello(*frames.VERSIONS, Role.REQUEST, DIGEST))
            data = HEADER.pack(Kind.HELLO, 0, 0, 0, 0, len(hello)) + hello + data
        sock.sendall(data)
        channel.socket.socket.shutdown(sock, socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):
            while sock.recv(4096):
                pass
    assert text(worker, ask(words=1)) == "word0 "


@pytest.mark.parametrize(
    ("payload", "says"),
    [(b"{}", "either a prompt"), (b"[" * 9000, "not valid"), (b'{"prompt": 3}', "prompt")],
)
def test_a_bad_request_gets_a_sentence(live, payload, says):
    server, _, context = live
    c, _ = connect(server.address, context, Role.REQUEST, DIGEST, 10)
    c.send(Kind.GENERATE, payload)
    error = c.read_error(c.receive())
    c.close()
    assert isinstance(error, RequestError) and says in str(error)


def test_a_device_cannot_write_the_log(live, caplog):
    server, _, context = live
    c, _ = connect(server.address, context, Role.REQUEST, DIGEST, 10)
    c.send(Kind.GENERATE, b'{"prompt": "x", "a\\n\\u001b[2Jdevice other: forged' + b"x" * 9000 + b'": 1}')
    assert isinstance(c.read_error(c.receive()), RequestError)
    c.close()
    (line,) = [r.getMessage() for r in caplog.records if "forged" in r.getMessage()]
    assert line.isprintable() and len(line) < 300


def test_connections_are_limited_per_device_and_in_all(home, identity):
    other = enrol(home, "other")
    context = tls.client_context(identity)
    with serving(home, max_connections=3, max_workers=2) as server:
        mine = [connect(server.address, context, Role.WORK, DIGEST, 10)[0] for _ in range(2)]
        refused(server, identity, LinkError, "2 workers connected already")
        theirs = connect(server.address, tls.client_context(other), Role.WORK, DIGEST, 10)[0]
        refused(server, other, LinkError, "too many connections")
        for each in (*mine, theirs):
            each.close()


def test_a_few_devices_cannot_take_all_connections(home, identity):
    with serving(home, max_connections=20, max_workers=2) as server, contextlib.ExitStack() as stack:
        for i in range(4):
            context = tls.client_context(enrol(home, str(i)))
            with pytest.raises(LinkError, match="too many connections"):
                for _ in range(20):
                    stack.enter_context(
                        contextlib.closing(connect(server.address, context, Role.REQUEST, DIGEST, 10)[0])
                    )
        with working(server, identity):
            assert len(server._connections) <= 18


def test_requests_are_limited_per_device(home, identity):
    engine = FakeEngine(0.01)
    with serving(home, engine, max_requests=2) as server, working(server, identity) as worker:
        running_ones = [worker.generate(ask(words=10_000)) for _ in range(2)]
        for each in running_ones:
            next(each)
        with pytest.raises(LinkError, match="2 requests running or waiting"):
            text(worker)
        running_ones[0].close()
        wait_until(lambda: len(server._connections) == 2)  # WORK, and the other request
        assert text(worker)
        running_ones[1].close()


def test_a_busy_engine_says_so(home, identity):
    def busy(request, link):
        raise BusyError("the trusted side is busy")

    engine = FakeEngine()
    engine.generate = busy  # type: ignore[method-assign]
    with serving(home, engine) as server, working(server, identity), contextlib.suppress(LinkError):
        c, _ = connect(server.address, tls.client_context(identity), Role.REQUEST, DIGEST, 10)
        c.send(Kind.GENERATE, b'{"prompt": "x"}')
        header = c.receive()
        assert (header.group, str(c.read_error(header))) == (Code.BUSY, "the trusted side is busy")
        c.close()


def test_strangers_cannot_lock_devices_out(home, identity):
    with serving(home, max_strangers=8, max_connections=8) as server, working(server, identity) as worker:
        flood = [socket.create_connection(server.address, 10) for _ in range(40)]
        wait_until(lambda: server._connections.strangers == 8)
        assert text(worker)
        assert flood[0].recv(1) == b""  # the oldest made room
        for sock in flood:
            sock.close()


def test_whoever_floods_the_server_evicts_itself(home):
    connections = Connections(max_strangers=4, max_connections=4, max_workers=4, max_requests=4)
    for i, host in enumerate(["10.0.0.1", "2001:db8::1", "2001:db8::2", "2001:db8::3", "10.0.0.2"]):
        connections.admit(threading.Thread(name=str(i)), socket.socket(), host)
    assert [t.name for t in connections.all()] == ["0", "2", "3", "4"]
    for sock in connections.all().values():
        sock.close()
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") != network("10.0.0.2")
    assert network("fe80::1%eth0") == network("fe80::2%eth0")


def test_the_server_survives_a_lack_of_threads(home, identity, monkeypatch):
    with serving(home) as server, working(server, identity) as worker:
        start = threading.Thread.start

        def no_more(thread: threading.Thread) -> None:
            if thread.name.startswith("slip "):
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            with pytest.raises(LinkError):
                text(worker)
        assert text(worker) and not server._connections.strangers


def test_a_registry_that_cannot_be_read_is_a_passing_failure(home, identity, caplog, monkeypatch):
    with serving(home) as server:
        with monkeypatch.context() as patch:
            break_registry(patch, server)
            with pytest.raises(LinkError, match="try again later") as caught:
                connect(server.address, tls.client_context(identity), Role.WORK, DIGEST, 10)
            assert str(home) not in str(caught.value) and not isinstance(caught.value, IdentityError)
            wait_until(lambda: f"{home / 'registry.db'} cannot be used" in caplog.text)
        with working(server, identity) as worker:
            assert text(worker)
