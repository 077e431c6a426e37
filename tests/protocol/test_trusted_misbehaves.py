"""A trusted side that misbehaves: the edge says so, and never takes a broken stream for a text."""

from __future__ import annotations

import pytest
from link_fakes import (
    VERSION,
    ask,
    make_engine,
    scripted,
    wait_until,
    working,
)

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import Code, LinkError, ProtocolError, RequestError
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import HEADER, Kind


@pytest.mark.parametrize(
    ("send", "says"),
    [
        (lambda c: c._write(HEADER.pack(3, VERSION, 9, 1, 1, 16)), "no group 9"),
        (lambda c: c._write(HEADER.pack(3, VERSION, 0, 1, 1, 32)), "rows of 4 numbers"),
        (lambda c: c._write(HEADER.pack(3, VERSION, 0, 1024, 1, 256 << 20)), "rows of 4 numbers"),
        (lambda c: c._write(HEADER.pack(3, VERSION, 0, 1025, 1, 1025 * 16)), "1025 rows"),
        (lambda c: c._write(HEADER.pack(3, VERSION, 0, 1, 1, 16) + b"\xff" * 16), "outside the field"),
        (lambda c: c.send(Kind.TEXT, b"{}"), "TEXT out of turn"),
        (lambda c: c._write(b"GET / HTTP/1.1\r\n"), "unknown kind"),
    ],
)
def test_the_worker_answers_nonsense_with_a_sentence_and_comes_back(home, identity, send, says):
    answers: list[str] = []

    def script(c: Channel) -> None:
        send(c)
        answers.append(str(c.read_error(c.receive())))

    with scripted(home, script) as address, working(address, identity):
        wait_until(lambda: len(answers) >= 2)
    assert all(says in answer for answer in answers)


def test_the_worker_leaves_a_silent_trusted_side_and_comes_back(home, identity):
    greeted: list[Channel] = []
    with scripted(home, greeted.append) as address, working(address, identity, idle_timeout=0.2):
        wait_until(lambda: len(greeted) >= 3)


@pytest.mark.parametrize(
    ("send", "error", "says"),
    [
        (lambda c: c.send(Kind.TEXT, b"{}"), ProtocolError, "malformed chunk"),
        (
            lambda c: c.send(Kind.TEXT, b'{"text": "a", "finish_reason": "stop"}'),
            ProtocolError,
            "after its end",
        ),
        (lambda c: c.send(Kind.DONE, b'{"text": "a"}'), ProtocolError, "after its end"),
        (lambda c: c.send(Kind.PING), ProtocolError, "PING out of turn"),
        (lambda c: None, LinkError, "closed the connection"),
        (lambda c: c._write(b"abc"), LinkError, "closed the connection"),
        (lambda c: c.send_error(Code.REQUEST, "too long"), RequestError, "too long"),
        (lambda c: c.send_error(99, "strange"), LinkError, "strange"),
    ],
)
def test_the_client_never_takes_a_broken_stream_for_a_text(home, identity, send, error, says):
    def script(c: Channel) -> None:
        c.read(c.receive())
        c.send(Kind.TEXT, b'{"text": "begun"}')
        send(c)

    with scripted(home, script) as address:
        stream = EdgeWorker(make_engine(), address, identity).generate(ask())
        assert next(stream).text == "begun"
        with pytest.raises(error, match=says):
            next(stream)
        assert list(stream) == []


def test_the_client_gives_up_a_stalled_generation(home, identity):
    with scripted(home, lambda c: c.receive() and c.peer_left()) as address:
        worker = EdgeWorker(make_engine(), address, identity, generate_timeout=0.2)
        with pytest.raises(LinkError):
            list(worker.generate(ask()))
