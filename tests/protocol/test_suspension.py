"""A lie has consequences, however its request ends, and whatever the registry does meanwhile."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from link_fakes import OP, PADS, FakeEngine, ask, make_engine, running, serving, the_link, wait_until

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import LinkError, RegistryError, VerificationError
from sliplm.exchange.link import Link, Router
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.registry import Limits, authority
from sliplm.serve import watch as watch_module
from sliplm.serve.rules import Refused, Rules
from sliplm.serve.watch import Watch


class FoundLate(FakeEngine):
    """Finds out, when it is closed, that the edge has lied."""

    def generate(self, request: GenerateRequest, link: Link | Router) -> Iterator[Chunk]:
        def caught(op: Any, x: Any, pads: Any, link: Link, own: Any) -> None:
            link.close()
            raise VerificationError("an answer of the edge is wrong")

        try:
            yield from super().generate(request, link)
        finally:
            link.run(caught, OP, np.zeros((1, 4), np.uint32), PADS, None)


class Strict(Rules):
    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        if len(text) > 20:
            raise Refused("no")
        return text


def state(home: Path) -> str:
    with authority.open_registry(home) as registry:
        return registry.devices.get("laptop").state


@pytest.mark.parametrize("ends", ["its requester leaves", "a rule refuses", "a quota is used up", "the server stops"])
def test_a_lie_suspends_the_device_however_its_request_ends(home: Path, identity: Path, ends: str) -> None:
    rules = Strict() if ends == "a rule refuses" else None
    limits = Limits(daily_tokens=9 if ends == "a quota is used up" else 0)
    with serving(home, FoundLate(0.01), rules=rules, limits=limits) as server:
        worker = EdgeWorker(make_engine(), server.address, identity)
        with running(worker.run, worker.stop):
            the_link(server)
            generation = worker.generate(ask(words=10_000))
            next(generation)
            if ends == "its requester leaves":
                generation.close()
            elif ends == "the server stops":
                server.close()
            with contextlib.suppress(LinkError):
                list(generation)
            wait_until(lambda: state(home) == "suspended")
    assert b"verification_failures_total 1.0" in server.service.metrics.text()
    assert b'requests_total{outcome="unverified"} 1.0' in server.service.metrics.text()


def test_a_suspension_that_could_not_be_written_is_written_at_the_end(
    home: Path, identity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.registry.database.BUSY_SECONDS", 0.1)
    with authority.open_registry(home) as registry, contextlib.closing(sqlite3.connect(home / "registry.db")) as other:
        watch = Watch(registry.devices, set, lambda *_: None)
        other.execute("BEGIN IMMEDIATE")
        watch.suspend(registry.devices.get("laptop"), "it lied")
        assert registry.devices.get("laptop").state == "active"
        other.rollback()
        watch.close()
        assert registry.devices.get("laptop").reason == "it lied"


def test_a_watch_that_hangs_is_not_healthy(home: Path, identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(watch_module, "POLL_SECONDS", 0.01)
    answers = threading.Event()
    answers.set()
    with authority.open_registry(home) as registry, contextlib.ExitStack() as stack:
        version = registry.devices.version
        monkeypatch.setattr(registry.devices, "version", lambda: (answers.wait(10), version())[1])
        watch = Watch(registry.devices, set, lambda *_: None)
        watch.start()
        stack.callback(watch.close)
        stack.callback(answers.set)
        assert watch.healthy
        answers.clear()
        wait_until(lambda: not watch.healthy, 5)
        answers.set()
        wait_until(lambda: watch.healthy, 5)


def test_a_registry_that_hangs_keeps_nobody_connected() -> None:
    """The first suspension waits for it, the second one for nothing."""
    answers, cut = threading.Event(), set[str]()

    class Hanging:
        def suspend(self, *_: object) -> None:
            answers.wait(20)

    def gone(fingerprint: str, _: Exception) -> None:
        cut.add(fingerprint)

    watch = Watch(Hanging(), set, gone)  # type: ignore[arg-type]
    devices = [SimpleNamespace(fingerprint=name, name=name) for name in "ab"]
    threads = [threading.Thread(target=watch.suspend, args=(device, "it lied")) for device in devices]
    threads[0].start()
    wait_until(lambda: "a" in cut)
    threads[1].start()
    wait_until(lambda: "b" in cut, 10)
    answers.set()
    for thread in threads:
        thread.join(10)


def test_revocations_are_seen_while_a_suspension_cannot_be_written(home: Path, identity: Path) -> None:
    with authority.open_registry(home) as registry:
        device, seen = registry.devices.get("laptop"), list[str]()
        watch = Watch(registry.devices, lambda: {device.fingerprint}, lambda f, e: seen.append(str(e)))
        registry.devices.revoke("laptop")

        def fails(*_: object) -> None:
            raise RegistryError("the registry does not answer")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry.devices, "suspend", fails)
            watch._unsuspended["other"] = device, "it lied"
            watch._look()
        assert seen == ["the device 'laptop' was revoked"]
