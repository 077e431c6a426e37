"""Peers that speak an older version of the protocol get what that version has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from link_fakes import FakeEngine, ask, enrol, running, serving, wait_until

from sliplm.edge.worker import EdgeWorker
from sliplm.protocol import frames
from sliplm.protocol.messages import Chunk, GenerateRequest


class Guessing(FakeEngine):
    def generate(self, request: GenerateRequest, link: object) -> Iterator[Chunk]:
        yield Chunk("a", None, 3, 1, accepted_tokens=0, rejected_tokens=1)
        yield Chunk("b", None, 3, 2, accepted_tokens=1, rejected_tokens=1)
        yield Chunk("c", "stop", 3, 3, accepted_tokens=1, rejected_tokens=1)


@pytest.mark.parametrize("version", [3, 4])
def test_guesses_are_counted_for_those_who_know_of_them(
    home: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Guessing()
    with serving(home, engine) as server, monkeypatch.context() as patch:
        choose = frames.choose_version
        patch.setattr("sliplm.serve.greeting.frames.choose_version", lambda hello: min(version, choose(hello)))
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            *_, last = worker.generate(ask())
        counted = (1, 1) if version == 4 else (0, 0)
        assert last.text == "c" and (last.accepted_tokens, last.rejected_tokens) == counted
        wait_until(lambda: not server._connections)
        drafted = server.service.metrics.drafted
        assert [drafted.labels(how)._value.get() for how in ("accepted", "rejected")] == [1, 1]
