"""What ends a request that its device did not end: a registry that fails, a revocation, a drain."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from link_fakes import (
    DIGEST,
    SHAPES,
    FakeEngine,
    ask,
    break_registry,
    enrol,
    revoke_device,
    running,
    serving,
    text,
    usage,
    wait_until,
    working,
)

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, IdentityError, LinkError, RequestError
from sliplm.exchange.link import Link
from sliplm.protocol import tls
from sliplm.protocol.connect import connect
from sliplm.protocol.frames import Kind, Role
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.registry import authority
from sliplm.serve import meter
from sliplm.serve.server import TrustedServer


def test_nothing_is_generated_that_cannot_be_recorded(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meter, "UPDATE_SECONDS", 0.05)
    monkeypatch.setattr(meter, "GRACE_SECONDS", 0.5)
    with serving(home, FakeEngine(0.01)) as server, working(server, enrol(home)) as worker:
        generation = worker.generate(ask(words=100_000))
        next(generation)
        with monkeypatch.context() as patch:
            break_registry(patch, server)
            with pytest.raises(BusyError, match="cannot record usage"):
                list(generation)
            assert not server.ready
            with pytest.raises(LinkError, match="cannot look this device up"):
                text(worker)
        wait_until(lambda: usage(home)[0][2] == "busy")  # written when it can be
        wait_until(lambda: server.ready)
        assert text(worker)
        assert "disk I/O error" in caplog.text and usage(home)[0][1] > 0


def test_a_locked_registry_refuses_new_requests(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.registry.database.BUSY_SECONDS", 0.2)
    with serving(home) as server, working(server, enrol(home)) as worker:
        other = sqlite3.connect(home / "registry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError, match="cannot record usage just now: try again later"):
            text(worker)
        other.execute("ROLLBACK")
        other.close()
        assert text(worker)
    assert usage(home) == [(3, 3, "length")]


def ended(generation: object, within: float) -> tuple[BaseException, float]:
    """The exception that ends a generation, and how long it took."""
    started = time.monotonic()
    with pytest.raises(Exception) as caught:
        list(generation)  # type: ignore[call-overload]
    took = time.monotonic() - started
    assert took < within
    return caught.value, took


@pytest.mark.parametrize("how", ["revoke", "suspend"])
def test_revocation_cuts_running_and_waiting_requests(home: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.serve.connections.CUT_SECONDS", 20.0)  # so that it is not what does it
    engine = FakeEngine(0.01)
    engine.capacity = 1
    identity = enrol(home)
    with serving(home, engine) as server:
        worker = EdgeWorker(FakeEngine()._truth, server.address, identity)
        with running(worker.run, worker.stop) as raised:
            assert worker.connected.wait(10)
            first = worker.generate(ask(words=100_000))
            next(first)
            second = worker.generate(ask())
            next(second)
            with authority.open_registry(home) as registry:
                if how == "revoke":
                    registry.devices.revoke("laptop")
                else:
                    registry.devices.suspend(registry.devices.get("laptop"), "a test")
            for generation in (first, second):
                error, _ = ended(generation, within=20)
                assert isinstance(error, IdentityError) and how[:6] in str(error)
            wait_until(lambda: bool(raised) and not server._connections)
            assert isinstance(raised[0], IdentityError)
    assert next(outcome for *_, outcome in usage(home)) == "interrupted"


class Endless(FakeEngine):
    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        while True:
            yield Chunk("x" * 500_000)


def test_a_device_that_does_not_read_is_cut_all_the_same(home: Path) -> None:
    """Its request's thread waits for room in the socket, and sees no reason to stop."""
    identity = enrol(home)
    with serving(home, Endless()) as server:
        worker = EdgeWorker(Endless()._truth, server.address, identity)
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            silent, _ = connect(server.address, tls.client_context(identity), Role.REQUEST, DIGEST, 10)
            silent.send(Kind.GENERATE, b'{"prompt": "hi"}')
            wait_until(lambda: server.service.queue.running == 1)
            time.sleep(0.3)  # the socket fills
            revoke_device(home, "laptop")
            wait_until(lambda: not server._connections, 10)
            silent.close()


def test_a_device_is_told_why_it_was_cut_off_however_long_the_next_word_takes(home: Path) -> None:
    engine = FakeEngine(2.5)
    with serving(home, engine) as server:
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            generation = worker.generate(ask(words=10))
            next(generation)
            revoke_device(home, "laptop")
            error, _ = ended(generation, within=20)
            assert isinstance(error, IdentityError) and "revoked" in str(error)


def test_an_edge_that_is_refused_for_good_says_so_to_those_who_asked_it(home: Path) -> None:
    """Its own end may overtake what the trusted side says to each of them."""
    engine = FakeEngine(2.0)
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        generation = worker.generate(ask(words=10))
        next(generation)
        worker.failure = IdentityError("the device 'laptop' was revoked")  # as `run` finds it when it reconnects
        worker.stop()
        error, _ = ended(generation, within=20)
        assert isinstance(error, IdentityError) and "revoked" in str(error)


def test_a_drain_lets_running_requests_finish(home: Path) -> None:
    engine = FakeEngine(0.02)
    engine.capacity = 1
    server = TrustedServer(engine, DIGEST, SHAPES, home)
    with running(server.serve_forever, server.close) as raised:
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            first = worker.generate(ask(words=50))
            next(first)
            second = worker.generate(ask())
            next(second)
            server.drain(30)
            assert not server.ready
            with pytest.raises(BusyError, match="shutting down"):
                list(second)
            assert list(first)[-1].finish_reason == "length"
            assert server._stopped.wait(10)
            with pytest.raises(LinkError):
                text(worker)
    assert not raised and [outcome for *_, outcome in usage(home)] == ["length", "busy"]


@pytest.mark.parametrize("how", ["time runs out", "close"])
def test_a_drain_ends(home: Path, how: str) -> None:
    engine = FakeEngine(0.02)
    server = TrustedServer(engine, DIGEST, SHAPES, home)
    with running(server.serve_forever, server.close) as raised:
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            first = worker.generate(ask(words=100_000))
            next(first)
            server.drain(0.2 if how == "time runs out" else 600)
            if how == "close":
                server.close()
            error, _ = ended(first, within=20)
            assert isinstance(error, LinkError) and not isinstance(error, RequestError)
    assert not raised and [outcome for *_, outcome in usage(home)] == ["interrupted"]
