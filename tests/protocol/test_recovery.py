"""Failures in the middle, and the way back."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

import pytest
from link_fakes import (
    DIGEST,
    SHAPES,
    FakeEngine,
    Pair,
    ask,
    enrol,
    list_devices,
    make_engine,
    refused,
    running,
    serving,
    text,
    the_link,
    wait_until,
    working,
)

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import (
    BundleError,
    InternalError,
    LinkError,
    NumericsError,
    RegistryError,
    RequestError,
    RulesError,
    SlipError,
)
from sliplm.protocol import tls
from sliplm.protocol.connect import connect, parse_address
from sliplm.protocol.frames import Role
from sliplm.serve.server import TrustedServer

pytestmark = pytest.mark.slow


def test_a_request_without_a_worker(home, identity):
    with serving(home, worker_wait=0.1) as server, pytest.raises(LinkError, match="no edge is connected"):
        text(EdgeWorker(make_engine(), server.address, identity))


def test_a_request_waits_a_moment_for_its_worker(home, identity):
    with serving(home) as server:
        texts: list[str] = []
        client = EdgeWorker(make_engine(), server.address, identity)
        thread = threading.Thread(target=lambda: texts.append(text(client)))
        thread.start()
        with working(server, identity):
            thread.join(15)
    assert texts == ["word0 word1 word2 "]


def test_any_worker_serves_any_device(home, identity):
    other = enrol(home, "other")
    with serving(home, worker_wait=0.1) as server:
        client = EdgeWorker(make_engine(), server.address, other)
        with working(server, identity):
            wait_until(lambda: bool(server.links()))
            assert text(client) == "word0 word1 word2 "
        wait_until(lambda: not server.links())
        with pytest.raises(LinkError, match="no edge is connected"):
            text(client)


@pytest.mark.parametrize("how", ["dies", "lies", "stalls"])
def test_a_worker_of_another_device_that_fails_costs_no_request(home, identity, how, monkeypatch):
    monkeypatch.setattr("sliplm.exchange.edge.STALL_SECONDS", 1.5 if how == "stalls" else 20)
    monkeypatch.setattr("sliplm.exchange.edge.STALL_TIMES", 2)
    other, bad = enrol(home, "other"), make_engine()
    release = threading.Event()
    with serving(home, FakeEngine(0.01)) as server, working(server, identity) as worker:
        failing = EdgeWorker(bad, server.address, other)
        with running(failing.run, failing.stop):
            wait_until(lambda: len(server.links()) == 2)
            streams = [worker.generate(ask(words=60)) for _ in range(4)]
            texts: list[str] = []
            threads = [threading.Thread(target=lambda s=s: texts.append("".join(c.text for c in s))) for s in streams]
            for thread in threads:
                thread.start()
            wait_until(lambda: server.edges.rows["other"] > 20)
            if how == "dies":
                failing.stop()
            else:
                right = bad.product

                def wrong(group, x, out=None):
                    if how == "stalls":
                        release.wait(5)
                    y = right(group, x, out=out)
                    y[0, 0] ^= 1
                    return y

                bad.product = wrong
            for thread in threads:
                thread.join(30)
            release.set()
        assert texts == ["".join(f"word{i} " for i in range(60))] * 4
        assert server.edges.replaced >= 1
        if how == "lies":
            wait_until(lambda: {d.name: d.state for d in list_devices(home)}["other"] == "suspended")
            assert b"verification_failures_total 1.0" in server.service.metrics.text()
            assert b'outcome="unverified"} 0.0' in server.service.metrics.text()


def test_a_dead_link_is_passed_over(home, identity):
    """The newest connection lost its power: it is still open, and does not answer."""
    with serving(home, exchange_timeout=0.5) as server, working(server, identity) as worker:
        dead, _ = connect(server.address, tls.client_context(identity), Role.WORK, DIGEST, 10)
        wait_until(lambda: len(server.links()) == 2)
        the_link(server).last_used -= 2
        assert text(worker)
        dead.close()


def test_the_worker_comes_back_after_a_restart(home, identity):
    with serving(home) as server:
        address = server.address
        worker = EdgeWorker(make_engine(), address, identity)
        stack = contextlib.ExitStack()
        stack.enter_context(running(worker.run, worker.stop))
        assert worker.connected.wait(10) and text(worker)
    with stack:
        wait_until(lambda: not worker.connected.is_set())
        with serving(home, port=address[1]):
            assert worker.connected.wait(10)
            assert text(worker)


def test_the_worker_waits_for_a_trusted_side_to_appear(home, identity, caplog):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    worker = EdgeWorker(make_engine(), f"127.0.0.1:{port}", identity)
    with running(worker.run, worker.stop) as raised:
        wait_until(lambda: "trying again" in caplog.text)
        with serving(home, port=port):
            assert worker.connected.wait(10)
    assert not raised


def test_closing_cancels(home, identity):
    engine = FakeEngine(0.01)
    with serving(home, engine) as server, working(server, identity) as worker:
        stream = worker.generate(ask(words=10_000))
        next(stream)
        stream.close()
        assert engine.cancelled.wait(10)
        assert list(stream) == []
        engine.cancelled.clear()
        stream = worker.generate(ask(words=10_000))  # and now while another thread waits for text
        next(stream)
        threading.Timer(0.1, stream.close).start()
        with contextlib.suppress(LinkError):
            for _ in stream:
                pass
        assert engine.cancelled.wait(10)
        assert text(worker)  # the link survived


def test_shutting_down_ends_requests_with_a_sentence(home, identity):
    with serving(home, FakeEngine(0.01)) as server, working(server, identity) as worker:
        stream = worker.generate(ask(words=10_000))
        next(stream)
        threading.Thread(target=server.close).start()
        with pytest.raises(LinkError, match="shutting down"):
            list(stream)


@pytest.mark.parametrize("prompt", ["boom", "layer"])
def test_failures_of_the_engine_tell_the_edge_nothing(home, identity, caplog, prompt):
    caplog.set_level(logging.DEBUG, logger="sliplm")
    with serving(home) as server, working(server, identity) as worker:
        with pytest.raises(InternalError, match="its log says why") as caught:
            text(worker, ask(prompt))
        assert "layers.3" not in str(caught.value)
        assert text(worker)
    assert "secret" not in caplog.text and "boom" not in caplog.text
    assert ("RuntimeError in link_fakes.py" if prompt == "boom" else "layers.3") in caplog.text


FAULTS = [NumericsError("model.layers.3 is not finite"), RulesError("rules.py, line 3"), BundleError("a file"),
          MemoryError("3 GiB"), KeyError("a secret"), SlipError("a layer")]  # fmt: skip


def test_every_fault_inside_is_the_same_to_the_edge(home, identity):
    """Which it is would tell about activations, layers and rules."""
    left = list(FAULTS)

    def fail(request, link):
        raise left.pop()

    engine = FakeEngine()
    engine.generate = fail  # type: ignore[method-assign]
    sentences = set()
    with serving(home, engine) as server, working(server, identity) as worker:
        while left:
            with pytest.raises(InternalError) as caught:
                text(worker)
            sentences.add(str(caught.value))
    assert sentences == {"generation failed on the trusted side; its log says why"}


def test_a_registry_that_does_not_answer_is_no_fault_inside(home, identity):
    def fail(request, link):
        raise RegistryError("/secret/registry.db is locked")

    engine = FakeEngine()
    engine.generate = fail  # type: ignore[method-assign]
    passes = pytest.raises(LinkError, match="try again later")
    with serving(home, engine) as server, working(server, identity) as worker, passes as caught:
        text(worker)
    assert "secret" not in str(caught.value)


def test_a_fault_in_the_greeting_is_said_and_the_worker_comes_back(home, identity, monkeypatch):
    with serving(home) as server:
        admit = server._watch.admit
        monkeypatch.setattr(server._watch, "admit", lambda _: {}["a secret"])
        refused(server, identity, InternalError, "^generation failed on the trusted side; its log says why$")
        worker = EdgeWorker(make_engine(), server.address, identity)
        with running(worker.run, worker.stop) as raised:
            assert not worker.connected.wait(0.3)
            monkeypatch.setattr(server._watch, "admit", admit)
            assert worker.connected.wait(10), raised


def test_an_engine_that_stops_early_is_not_taken_for_done(home, identity):
    engine = FakeEngine()
    engine.generate = lambda request, link: iter(())  # type: ignore[method-assign]
    with serving(home, engine) as server, working(server, identity) as worker, pytest.raises(InternalError):
        text(worker)


def test_a_request_that_is_too_long_for_the_model_is_explained(home, identity):
    def refuse(request, link):
        raise RequestError("the prompt has 9 tokens; the model takes 8")

    engine = FakeEngine()
    engine.generate = refuse  # type: ignore[method-assign]
    explained = pytest.raises(RequestError, match="the model takes 8")
    with serving(home, engine) as server, working(server, identity) as worker, explained:
        text(worker)


def test_a_port_in_use(home):
    with (
        serving(home) as server,
        pytest.raises(LinkError, match=r"cannot listen on .* address already in use"),
    ):
        TrustedServer(FakeEngine(), DIGEST, SHAPES, home, *server.address)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a" * 70])
def test_addresses_that_do_not_exist(home, identity, host):
    with pytest.raises(LinkError, match="not an address of this machine"):
        TrustedServer(FakeEngine(), DIGEST, SHAPES, home, host, 0)
    with pytest.raises(LinkError):
        text(EdgeWorker(make_engine(), (host, 1), identity))


def test_a_server_can_be_closed_before_it_serves(home):
    server = TrustedServer(FakeEngine(), DIGEST, SHAPES, home)
    server.close()
    server.serve_forever()


def test_addresses():
    assert parse_address("localhost:80") == ("localhost", 80)
    assert parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("", "localhost", ":80", "localhost:", "localhost:x", "a:65536", "::1:80", "a:-1", "a:²"):
        with pytest.raises(LinkError, match="HOST:PORT"):
            parse_address(wrong)


def test_reprs_hold_no_data(home, identity):
    with Pair(home, identity) as pair:
        assert repr(pair.link) == "RemoteLink(the edge, alive)" and repr(pair.edge) == "Channel(the trusted side)"
