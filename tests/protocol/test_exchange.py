"""The link at work, over real sockets and TLS, and edges that misbehave in the middle of an exchange."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from link_fakes import (
    SHAPES,
    VERSION,
    FakeEngine,
    Pair,
    WrongMatrix,
    answer_of,
    ask,
    make_engine,
    refused,
    rows,
    running,
    serving,
    text,
    the_link,
    wait_until,
    working,
)

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import Code, IdentityError, LinkError, ProtocolError, TooLongError, VerificationError
from sliplm.exchange.link import InProcessLink
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import HEADER, Kind
from sliplm.registry import authority


def test_exchanges_are_exact(home, identity):
    truth = make_engine()
    with serving(home) as server, working(server, identity):
        remote = the_link(server)
        for group, count in [(0, 1), (1, 1), (0, 7), (1, 1024)]:
            x = rows(count, group)
            y = answer_of(remote, group, x)
            assert y.dtype == np.uint32 and np.array_equal(y, truth.product(group, x))
        x = rows(6)[::2]  # not contiguous
        assert np.array_equal(answer_of(remote, 0, x), truth.product(0, x))


def test_an_answer_stays_valid_after_the_next_one(home, identity):
    with serving(home) as server, working(server, identity):
        remote = the_link(server)
        first = answer_of(remote, 0, rows(2))
        kept = first.copy()
        answer_of(remote, 0, rows(2))
        assert np.array_equal(first, kept)


def test_threads_share_a_link(home, identity):
    truth, wrong = make_engine(), []
    with serving(home) as server, working(server, identity):
        remote = the_link(server)

        def use(group: int) -> None:
            for _ in range(50):
                x = rows(3, group)
                if not np.array_equal(answer_of(remote, group, x), truth.product(group, x)):
                    wrong.append(group)

        threads = [threading.Thread(target=use, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not wrong


def test_text_is_generated(home, identity):
    with serving(home) as server, working(server, identity) as worker:
        chunks = list(worker.generate(ask()))
        assert [c.text for c in chunks] == ["word0 ", "word1 ", "word2 "]
        assert (chunks[-1].finish_reason, chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (
            "length",
            3,
            3,
        )
        assert worker.model_name == "fake-model"


def test_a_prompt_that_is_too_long_is_told_from_other_mistakes(home, identity):
    class Short(FakeEngine):
        def generate(self, request, link):
            raise TooLongError("This model's maximum context length is 1 tokens.")

    told = pytest.raises(TooLongError, match="maximum context length is 1")
    with serving(home, Short()) as server, working(server, identity) as worker, told:
        text(worker)


def test_requests_run_at_the_same_time(home, identity):
    texts = []
    with serving(home, FakeEngine(0.005)) as server, working(server, identity) as worker:
        threads = [threading.Thread(target=lambda: texts.append(text(worker))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert texts == ["word0 word1 word2 "] * 8


def test_in_process():
    local = InProcessLink(make_engine())
    x = rows(3, 1)
    assert np.array_equal(answer_of(local, 1, x), make_engine().product(1, x))
    with pytest.raises(ProtocolError):
        answer_of(local, 2, x)
    with pytest.raises(ProtocolError):
        answer_of(local, 0, x)
    with pytest.raises(ProtocolError):
        answer_of(local, 1, x | np.uint32(1 << 31))
    local.close()
    with pytest.raises(LinkError):
        answer_of(local, 1, x)


def test_a_wrong_question_is_the_caller_s_fault(home, identity):
    with Pair(home, identity) as pair:
        for group, x in [
            (2, rows(1)),
            (-1, rows(1)),
            (1, rows(1)),
            (0, rows(1).astype(np.int64)),
            (0, rows(0)),
            (0, rows(1025)),  # more than a frame may carry
        ]:
            with pytest.raises(ValueError):
                answer_of(pair.link, group, x)
        assert pair.link.alive


def result(edge: Channel, header, sequence=0, group=0, extra_rows=0, extra_cols=0) -> None:
    m = SHAPES[header.group][0]
    staged = edge.stage(header.rows + extra_rows, m + extra_cols)
    staged[:] = 1
    edge.send_staged(Kind.RESULT, header.group + group, header.sequence + sequence, staged)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (lambda e, h: result(e, h, sequence=1), ProtocolError, "does not belong"),
        (lambda e, h: result(e, h, group=1), ProtocolError, "does not belong"),
        (lambda e, h: result(e, h, extra_rows=1), ProtocolError, "does not belong"),
        (lambda e, h: result(e, h, extra_cols=1), ProtocolError, "does not belong"),
        (lambda e, h: e.send(Kind.PONG, sequence=h.sequence), ProtocolError, "does not belong"),
        (lambda e, h: e.send(Kind.TEXT, b"{}"), ProtocolError, "TEXT out of turn"),
        (
            lambda e, h: e.send_error(Code.FAILED, "no\x1b[2J memory"),
            ProtocolError,
            r"answered: no \[2J memory",
        ),
        (lambda e, h: e._write(b"\xff" * 16), ProtocolError, "unknown kind"),
        (lambda e, h: e._write(HEADER.pack(4, VERSION, 0, 2, h.sequence, 1 << 31)), ProtocolError, "announced"),
        (
            lambda e, h: e._write(HEADER.pack(4, VERSION, 0, 2, h.sequence, 48) + b"abc") or e.close(),
            LinkError,
            "closed the connection",
        ),
        (lambda e, h: e._write(b"abc") or e.close(), LinkError, "closed the connection"),
        (lambda e, h: e.close(), LinkError, "closed the connection"),
        (lambda e, h: e.abort(), LinkError, "closed the connection"),
        (
            lambda e, h: e._sock.sendall(b"not TLS at all, sorry"),
            LinkError,
            "encrypted",
        ),
    ],
)
def test_a_bad_answer_ends_the_link_for_good(home, identity, answer, error, says):
    with Pair(home, identity) as pair:
        with pair.answering(answer), pytest.raises(error, match=says):
            answer_of(pair.link, 0, rows(2))
        assert not pair.link.alive
        with pytest.raises(LinkError, match="is closed"):
            answer_of(pair.link, 0, rows(2))


def test_an_answer_sent_twice_is_refused_the_second_time(home, identity):
    def twice(edge: Channel, header) -> None:
        result(edge, header)
        result(edge, header)

    with Pair(home, identity) as pair, pair.answering(twice):
        answer_of(pair.link, 0, rows(2))
        with pytest.raises(ProtocolError, match="does not belong"):
            answer_of(pair.link, 0, rows(2))


@pytest.mark.parametrize(
    "partly", [b"", HEADER.pack(4, VERSION, 0, 2, 1, 48), HEADER.pack(4, VERSION, 0, 2, 1, 48) + b"abc"]
)
def test_a_stalled_edge_is_given_up(home, identity, partly):
    with Pair(home, identity, timeout=0.2) as pair, pair.answering(lambda e, h: e._write(partly)):
        with pytest.raises(LinkError, match=r"did not answer within 0\.2 s"):
            answer_of(pair.link, 0, rows(2))
        assert not pair.link.alive


def test_a_dripping_edge_is_given_up(home, identity):
    def drip(edge: Channel, header) -> None:
        with contextlib.suppress(LinkError):
            edge._write(HEADER.pack(Kind.RESULT, VERSION, 0, 2, header.sequence, 48))
            for _ in range(47):
                edge._write(b"\0")
                time.sleep(0.1)

    silent = pytest.raises(LinkError, match="did not answer")
    with Pair(home, identity, timeout=0.3) as pair, pair.answering(drip), silent:
        answer_of(pair.link, 0, rows(2))


def test_a_dripping_header_is_given_up(home, identity):
    def drip(edge: Channel, header) -> None:
        with contextlib.suppress(LinkError):
            for byte in HEADER.pack(Kind.RESULT, VERSION, 0, 2, header.sequence, 48):
                edge._write(bytes([byte]))
                time.sleep(0.1)

    with Pair(home, identity, timeout=0.3) as pair, pair.answering(drip):
        started = time.monotonic()
        with pytest.raises(LinkError, match="did not answer"):
            answer_of(pair.link, 0, rows(2))
        assert time.monotonic() - started < 1.2


def test_an_edge_that_does_not_read_is_given_up(home, identity):
    with Pair(home, identity, timeout=0.3) as pair, pytest.raises(LinkError):
        for _ in range(1000):
            pair.trusted.send(Kind.TEXT, bytes(1 << 20))


def test_close_wakes_an_exchange(home, identity):
    with Pair(home, identity, timeout=60) as pair:
        timer = threading.Timer(0.1, pair.link.close)
        timer.start()
        with pytest.raises(LinkError):
            answer_of(pair.link, 0, rows(2))
        timer.join(10)


def test_a_cheating_edge_is_cut_off_and_no_text_of_it_appears(home, identity, monkeypatch):
    monkeypatch.setattr("sliplm.serve.connections.CUT_SECONDS", 20.0)  # its request is told, however slow we are
    with serving(home) as server:
        worker = EdgeWorker(make_engine(WrongMatrix), server.address, identity)
        with running(worker.run, worker.stop) as raised:
            cheated = the_link(server)
            with pytest.raises(VerificationError, match="failed its check"):
                text(worker)
            assert not cheated.alive
            wait_until(lambda: bool(raised))  # it is suspended, and may not come back
        assert isinstance(raised[0], IdentityError) and "suspended" in str(raised[0])
        refused(server, identity, IdentityError, "suspended")
        with authority.open_registry(home) as registry:
            device = registry.devices.resume("laptop")
            assert [e.kind for e in registry.devices.events(device)] == ["resumed", "suspended", "added"]
        with working(server, identity) as honest:
            wait_until(lambda: not server._watch._unsuspended)
            assert text(honest)


EDGE = """
import sys; sys.path[:0] = sys.argv[3:]
from link_fakes import make_engine
from sliplm.edge.connection import ATTEMPTS
from sliplm.edge.worker import EdgeWorker
EdgeWorker(make_engine(), sys.argv[1], sys.argv[2]).run()
"""


@pytest.mark.slow
def test_an_edge_killed_in_the_middle_is_noticed_at_once(home, identity):
    here = Path(__file__).parent
    with serving(home, FakeEngine(0.02), worker_wait=0.2) as server:
        where = "{}:{}".format(*server.address)
        process = subprocess.Popen([sys.executable, "-c", EDGE, where, str(identity), str(here), str(here.parent)])
        try:
            the_link(server)
            client = EdgeWorker(make_engine(), where, identity)
            with pytest.raises(LinkError, match="no edge is connected"):
                for i, chunk in enumerate(client.generate(ask(words=10_000))):
                    assert chunk.finish_reason is None
                    if i == 3:
                        os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait(10)
        wait_until(lambda: not server.links())


def test_a_header_that_trickles_in_is_given_up(home, identity):
    """Its time begins with the wait for it, not with its first byte."""
    with Pair(home, identity, timeout=0.5) as pair:
        header = HEADER.pack(Kind.PING, VERSION, 0, 0, 1, 0)

        def trickle():
            for piece in (header[:1], header[1:2], header[2:]):
                time.sleep(0.4)
                with contextlib.suppress(OSError):
                    pair.trusted._write(piece)

        with running(trickle, lambda: None), pytest.raises(LinkError, match="did not answer"):
            pair.edge.receive()
