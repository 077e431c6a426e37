"""Several questions under way on one link, both directions at once, and edges that misbehave then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from link_fakes import DIGEST, SHAPES, VERSION, Pair, answer_of, make_engine, rows, running

from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import LinkError, ProtocolError
from sliplm.field import P
from sliplm.protocol import remote
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import HEADER, Kind
from sliplm.protocol.remote import RemoteLink

WIDE, MANY = 4096, 1024  # rows of such a frame, 16 MiB, are more than sockets hold


class Mirror:
    """An IntMatrix that multiplies by one."""

    nbytes = 0
    rows = cols = WIDE

    def product(self, x: np.ndarray, *, out: np.ndarray, threads: int = 0) -> np.ndarray:
        out[:] = x
        return out


@contextlib.contextmanager
def at_work(pair: Pair, engine: Multiplier, identity: Any) -> Iterator[None]:
    """The unchanged edge, which reads a frame, answers it, and reads the next."""
    worker = EdgeWorker(engine, ("localhost", 1), identity)
    with running(lambda: worker._serve(pair.edge), pair.link.close):
        yield


def wide(pair: Pair, timeout: float = 10.0) -> RemoteLink:
    pair.link = RemoteLink(pair.trusted, [(WIDE, WIDE)], "customer", timeout)
    return pair.link


def large(count: int) -> list[np.ndarray]:
    x = np.random.default_rng(0).integers(0, P, (MANY, WIDE)).astype(np.uint32)
    return [np.roll(x, i) for i in range(count)]


def nothing() -> None: ...


def test_answers_come_in_order_and_our_part_is_computed_once(home, identity):
    truth, called, asked = make_engine(), [], []
    questions = [rows(count, 1) for count in (3, 1, 1024, 7, 2, 5)]

    def asking() -> Iterator[np.ndarray]:
        for x in questions:
            asked.append(len(called))
            yield x

    with Pair(home, identity) as pair, at_work(pair, make_engine(), identity):
        for _ in range(3):
            called.clear(), asked.clear()
            answers = list(pair.link.exchanges(1, asking(), lambda: called.append(True)))
            assert len(answers) == len(questions)
            assert all(np.array_equal(y, truth.product(1, x)) for x, y in zip(questions, answers, strict=True))
            assert called == [True] and asked == [0, 1, 1, 1, 1, 1]
            assert np.array_equal(answer_of(pair.link, 0, questions[0][:, :4]), truth.product(0, questions[0][:, :4]))
        assert not list(pair.link.exchanges(0, iter(()), nothing)) and pair.link.alive


def test_several_are_under_way_and_not_too_many(home, identity):
    asked = 0

    def asking() -> Iterator[np.ndarray]:
        nonlocal asked
        for _ in range(7):
            asked += 1
            yield rows(2)

    with Pair(home, identity) as pair, at_work(pair, make_engine(), identity):
        seen = [asked for _ in pair.link.exchanges(0, asking(), nothing)]
    assert seen == [min(i + remote.AHEAD, 7) for i in range(7)] and remote.AHEAD > 1


def test_frames_larger_than_the_buffers_do_not_block_both_sides(home, identity):
    questions = large(5)
    with Pair(home, identity) as pair, at_work(pair, Multiplier([Mirror()], DIGEST), identity):
        answers = wide(pair).exchanges(0, iter(questions), nothing)
        for x, y in zip(questions, answers, strict=True):
            assert np.array_equal(x, y)


def test_a_question_that_cannot_be_made_is_no_failure_of_the_link(home, identity):
    truth, x = make_engine(), rows(2)

    def asking() -> Iterator[np.ndarray]:
        yield x
        yield x
        raise KeyError("no pads")

    with Pair(home, identity) as pair, at_work(pair, make_engine(), identity):
        answers = []
        with pytest.raises(KeyError):
            answers.extend(pair.link.exchanges(0, asking(), nothing))
        assert len(answers) == 2 and pair.link.alive
        assert np.array_equal(answer_of(pair.link, 0, x), truth.product(0, x))


def test_whoever_stops_early_ends_the_link(home, identity):
    with Pair(home, identity) as pair, at_work(pair, make_engine(), identity):
        answers = pair.link.exchanges(0, iter([rows(1) for _ in range(9)]), nothing)
        next(answers)
        answers.close()
        assert not pair.link.alive
        with pytest.raises(LinkError, match="is closed"):
            answer_of(pair.link, 0, rows(1))


@pytest.mark.parametrize("own", [nothing, pytest.param(lambda: 1 / 0, id="fails")])
def test_a_wrong_question_or_a_failure_of_our_part_ends_the_link(home, identity, own):
    with Pair(home, identity) as pair, at_work(pair, make_engine(), identity):
        with pytest.raises((ValueError, ZeroDivisionError)):
            list(pair.link.exchanges(0, iter([rows(1), rows(1, 1)]), own))
        assert not pair.link.alive


def results(edge: Channel, order: list[int]) -> None:
    headers = []
    for _ in order:
        headers.append(edge.receive())
        edge.read_array(np.empty((headers[-1].rows, SHAPES[0][1]), np.uint32))
    for i in order:
        staged = edge.stage(headers[i].rows, SHAPES[0][0])
        staged[:] = 1
        edge.send_staged(Kind.RESULT, 0, headers[i].sequence, staged)


@pytest.mark.parametrize("order", [[1, 0], [0, 0]])
def test_answers_in_another_order_end_the_link(home, identity, order):
    with Pair(home, identity) as pair, running(lambda: results(pair.edge, order), nothing):
        with pytest.raises(ProtocolError, match="does not belong"):
            list(pair.link.exchanges(0, iter([rows(2), rows(2)]), nothing))
        assert not pair.link.alive


def test_an_edge_that_does_not_read_is_given_up(home, identity, monkeypatch):
    monkeypatch.setattr("sliplm.protocol.channel.SLOWEST", 1e8)
    with Pair(home, identity) as pair:
        started = time.monotonic()
        with pytest.raises(LinkError, match=r"did not answer within 0\.3 s"):
            pair.trusted.set_timeout(0.3)
            list(wide(pair, 0.3).exchanges(0, iter(large(3)), nothing))
        assert time.monotonic() - started < 30 and not pair.link.alive


def test_an_edge_that_trickles_and_does_not_read_is_given_up(home, identity, monkeypatch):
    monkeypatch.setattr("sliplm.protocol.channel.SLOWEST", 1e8)
    stop = threading.Event()

    def trickle() -> None:
        header = pair.edge.receive()
        pair.edge.read_array(np.empty((MANY, WIDE), np.uint32))
        pair.edge._write(HEADER.pack(Kind.RESULT, VERSION, 0, MANY, header.sequence, header.length))
        with contextlib.suppress(LinkError):
            while not stop.wait(0.02):
                pair.edge._write(b"\0")

    with Pair(home, identity) as pair, running(trickle, stop.set):
        started = time.monotonic()
        with pytest.raises(LinkError, match=r"did not answer within 0\.5 s"):
            list(wide(pair, 0.5).exchanges(0, iter(large(3)), nothing))
        assert time.monotonic() - started < 15 and not pair.link.alive


@pytest.mark.parametrize("count", [1, 3])
def test_close_wakes_whoever_waits(home, identity, count):
    """For an answer, or for the edge to read."""
    with Pair(home, identity) as pair:
        link = wide(pair, 60)
        questions = large(count) if count > 1 else [np.zeros((1, WIDE), np.uint32)]
        timer = threading.Timer(0.3, link.close)
        timer.start()
        started = time.monotonic()
        with pytest.raises(LinkError):
            list(link.exchanges(0, iter(questions), nothing))
        assert time.monotonic() - started < 15
        timer.join(10)


def test_a_wrong_answer_and_then_silence_cost_no_time_of_ours(home: Any, identity: Any) -> None:
    """More of it lies there while we write: it must not be looked at again and again until the time is up."""
    with Pair(home, identity, 10.0) as pair:
        link = wide(pair)
        pair.edge._write(HEADER.pack(Kind.RESULT, VERSION, 0, 1, 77, 32) + bytes(16384))
        time.sleep(0.2)
        questions = iter([np.zeros((1, WIDE), np.uint32), np.zeros((MANY, WIDE), np.uint32)])
        begin = time.thread_time()
        with pytest.raises(ProtocolError, match="does not belong to the question"):
            list(link.exchanges(0, questions, lambda: None))
        assert time.thread_time() - begin < 2
