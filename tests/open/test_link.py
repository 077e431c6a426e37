"""Hidden states over real sockets and TLS: answers, refusals that leave the link alone, edges that break the rules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from link_fakes import Pair, answer_of, enrol, make_engine, rows, running, serving, the_link, wait_until, working
from open_fakes import WIDTH, Sums, states

from sliplm.edge.open import CacheLimits, OpenBlocks
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, Code, LinkError, ProtocolError
from sliplm.protocol import frames
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import HEADER, Kind
from sliplm.protocol.remote import RemoteLink


@contextlib.contextmanager
def linked(home: Path, blocks: OpenBlocks | None) -> Iterator[tuple[RemoteLink, EdgeWorker]]:
    identity = enrol(home)
    with serving(home) as server, working(server, identity, blocks=blocks) as worker:
        yield the_link(server), worker


def test_hidden_states_cross_and_come_back_in_both_types(tmp_path: Path) -> None:
    blocks, x = OpenBlocks([Sums(), Sums()]), states(5)
    with linked(tmp_path / "home", blocks) as (link, worker):
        assert np.array_equal(link.compute(1, 2**64 - 1, 0, x[:3], keep=True), np.cumsum(x[:3], axis=0))
        assert np.array_equal(link.compute(1, 2**64 - 1, 3, x[3:], keep=True), np.cumsum(x, axis=0)[3:])
        half = (x.view(np.uint32) >> 16).astype(np.uint16)  # small integers, which bfloat16 holds
        got = link.compute(0, 3, 0, half, keep=False)
        assert np.array_equal(got, (np.cumsum(x, axis=0).view(np.uint32) >> 16).astype(np.uint16))
        assert blocks.requests == 1
        link.forget(2**64 - 1)
        link.ping()
        assert not blocks.requests and worker.counters.exchanges == 3 and worker.counters.rows == 10


def test_two_requests_at_once_and_exchanges_between_them(tmp_path: Path) -> None:
    with linked(tmp_path / "home", OpenBlocks([Sums()])) as (link, _):
        wrong: list[object] = []
        done: list[int] = []

        def talk(request: int) -> None:
            x = states(20, request)
            want = np.cumsum(x, axis=0)
            for i in range(20):
                if not np.array_equal(link.compute(0, request, i, x[i : i + 1], keep=True), want[i : i + 1]):
                    wrong.append((request, i))
                question = rows(2)
                if not np.array_equal(answer_of(link, 0, question), make_engine().product(0, question)):
                    wrong.append(i)
            done.append(request)

        threads = [threading.Thread(target=talk, args=(request,)) for request in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong and sorted(done) == [0, 1]


def test_a_refusal_ends_the_request_and_not_the_link(tmp_path: Path) -> None:
    with linked(tmp_path / "home", OpenBlocks([Sums()], CacheLimits(count=1))) as (link, _):
        link.compute(0, 1, 0, states(2), keep=True)
        with pytest.raises(BusyError, match="no room for another"):
            link.compute(0, 2, 0, states(2), keep=True)
        with pytest.raises(BusyError, match="any more"):
            link.compute(0, 1, 9, states(2), keep=True)
        assert link.alive and link.compute(0, 2, 0, states(2), keep=True).shape == (2, WIDTH)


def test_caches_go_with_the_connection(tmp_path: Path) -> None:
    blocks = OpenBlocks([Sums()])
    with linked(tmp_path / "home", blocks) as (link, _):
        link.compute(0, 1, 0, states(2), keep=True)
        link.close()
        wait_until(lambda: not blocks.requests)
        with pytest.raises(LinkError):
            link.compute(0, 1, 2, states(1), keep=True)
        link.forget(1)  # of a link that has failed: nothing to say


def test_a_run_that_is_not_there_ends_the_link(tmp_path: Path) -> None:
    for blocks, says in ((OpenBlocks([Sums()]), "no run 1"), (None, "out of turn")):
        with linked(tmp_path / says, blocks) as (link, _):
            with pytest.raises(ProtocolError, match=says):
                link.compute(1, 1, 0, states(1), keep=True)
            assert not link.alive


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    identity = enrol(tmp_path / "home")
    with Pair(tmp_path / "home", identity) as pair:
        yield pair


def answering(pair: Pair, answer: Callable[[Channel, frames.Header], None]) -> contextlib.AbstractContextManager:
    def once() -> None:
        header = pair.edge.receive()
        pair.edge.read(header)
        answer(pair.edge, header)

    return running(once, lambda: None)


def frame(header: frames.Header, payload: bytes, **changes: int) -> bytes:
    fields = {"kind": int(Kind.STATES), "version": 4, "group": 0, "rows": header.rows, "sequence": header.sequence}
    return HEADER.pack(*(fields | changes).values(), len(payload)) + payload


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        ({"sequence": 99}, 24, "does not belong"),
        ({"group": 1}, 24, "does not belong"),
        ({"rows": 1}, 24, "does not belong"),
        ({}, 12, "does not belong"),
        ({"kind": int(Kind.PONG), "rows": 0}, 0, "does not belong"),
        ({"kind": int(Kind.DROP), "rows": 0, "sequence": 0}, 8, "DROP out of turn"),
    ],
)
def test_an_answer_to_something_else_ends_the_link(pair: Pair, changes: dict[str, int], size: int, says: str) -> None:
    with answering(pair, lambda edge, header: edge._write(frame(header, bytes(size), **changes))):
        with pytest.raises(ProtocolError, match=says):
            pair.link.compute(0, 1, 0, states(2), keep=True)
        assert not pair.link.alive


def test_another_error_than_busy_ends_the_link(pair: Pair) -> None:
    with answering(pair, lambda edge, _: edge.send_error(Code.FAILED, "no")):
        with pytest.raises(ProtocolError, match="the edge answered: no"):
            pair.link.compute(0, 1, 0, states(2), keep=True)
        assert not pair.link.alive


def test_an_older_edge_is_told_to_update(pair: Pair) -> None:
    pair.trusted.version = 3
    with pytest.raises(LinkError, match="speaks protocol version 3, without open blocks: update it"):
        pair.link.compute(0, 1, 0, states(2), keep=True)
