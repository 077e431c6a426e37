"""The link end to end: real sockets, real TLS, real threads, and peers that misbehave."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_fakes import (
    DIGEST,
    SHAPES,
    FakeEngine,
    WrongMatrix,
    break_registry,
    enrol,
    make_engine,
    running,
    serving,
    wait_until,
    working,
)
from test_authority import issue

from sliplm.edge.worker import ATTEMPTS, EdgeWorker
from sliplm.errors import BundleError, IdentityError, LinkError, ProtocolError, VerificationError
from sliplm.field import P
from sliplm.protocol import authority, channel, frames, link, tls
from sliplm.protocol.channel import Channel, connect, parse_address
from sliplm.protocol.frames import HEADER, Code, Hello, Kind, Role, Welcome
from sliplm.protocol.link import InProcessLink, RemoteLink
from sliplm.protocol.messages import BusyError, GenerateRequest, RequestError
from sliplm.trusted.server import TrustedServer
from sliplm.trusted.server import _network as network


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "authority"


@pytest.fixture
def identity(home) -> Path:
    return enrol(home)


def rows(count: int, group: int = 0) -> np.ndarray:
    return np.random.default_rng().integers(0, P, (count, SHAPES[group][1])).astype(np.uint32)


def the_link(server: TrustedServer) -> RemoteLink:
    wait_until(lambda: bool(server.links()))
    return server.links()[-1]


def ask(prompt: str = "hi", words: int = 3) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=words)


def text(worker: EdgeWorker, request: GenerateRequest | None = None) -> str:
    return "".join(chunk.text for chunk in worker.generate(request or ask()))


class Pair:
    """A trusted and an edge channel, connected by TLS over a real socket, and nobody behind them."""

    def __init__(self, home: Path, identity: Path, timeout: float = 10.0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            a = socket.create_connection(listener.getsockname(), 10)
            b = listener.accept()[0]
        sides: list[ssl.SSLSocket] = []
        server = tls.server_context(home)
        thread = threading.Thread(target=lambda: sides.append(server.wrap_socket(b, server_side=True)))
        thread.start()
        edge = tls.client_context(identity).wrap_socket(a, server_hostname=authority.SERVER_NAME)
        thread.join(10)
        self.edge = Channel(edge, "the trusted side", timeout)
        self.trusted = Channel(sides[0], "the edge", timeout)
        self.edge.version = self.trusted.version = 1
        self.link = RemoteLink(self.trusted, SHAPES, timeout)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        self.edge.close()
        self.trusted.close()

    def answering(self, answer) -> contextlib.AbstractContextManager:
        """The edge reads one EXCHANGE and then does `answer(edge, header)`."""

        def once() -> None:
            header = self.edge.receive()
            self.edge.read_array(np.empty((header.rows, SHAPES[header.group][1]), np.uint32))
            answer(self.edge, header)

        return running(once, lambda: None)


# --- it works ------------------------------------------------------------------------------------


def test_exchanges_are_exact(home, identity):
    truth = make_engine()
    with serving(home) as server, working(server, identity):
        remote = the_link(server)
        for group, count in [(0, 1), (1, 1), (0, 7), (1, 1024), (0, 1025), (1, 2500)]:
            x = rows(count, group)
            y = remote.exchange(group, x)
            assert y.dtype == np.uint32 and np.array_equal(y, truth.product(group, x))
        x = rows(6)[::2]  # not contiguous
        assert np.array_equal(remote.exchange(0, x), truth.product(0, x))


def test_long_inputs_travel_in_several_frames(home, identity, monkeypatch):
    monkeypatch.setattr(link, "FRAME_BYTES", 100)
    test_exchanges_are_exact(home, identity)


def test_an_answer_stays_valid_after_the_next_one(home, identity):
    with serving(home) as server, working(server, identity):
        remote = the_link(server)
        first = remote.exchange(0, rows(2))
        kept = first.copy()
        remote.exchange(0, rows(2))
        assert np.array_equal(first, kept)


def test_threads_share_a_link(home, identity):
    truth, wrong = make_engine(), []
    with serving(home) as server, working(server, identity):
        remote = the_link(server)

        def use(group: int) -> None:
            for _ in range(50):
                x = rows(3, group)
                if not np.array_equal(remote.exchange(group, x), truth.product(group, x)):
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
    assert np.array_equal(local.exchange(1, x), make_engine().product(1, x))
    with pytest.raises(ProtocolError):
        local.exchange(2, x)
    with pytest.raises(ProtocolError):
        local.exchange(0, x)
    with pytest.raises(ProtocolError):
        local.exchange(1, x | np.uint32(1 << 31))
    local.close()
    with pytest.raises(LinkError):
        local.exchange(1, x)


def test_a_wrong_question_is_the_caller_s_fault(home, identity):
    with Pair(home, identity) as pair:
        for group, x in [
            (2, rows(1)),
            (-1, rows(1)),
            (1, rows(1)),
            (0, rows(1).astype(np.int64)),
            (0, rows(0)),
        ]:
            with pytest.raises(ValueError):
                pair.link.exchange(group, x)
        assert pair.link.alive


# --- the edge misbehaves --------------------------------------------------------------------------


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
        (lambda e, h: e._write(HEADER.pack(4, 1, 0, 2, h.sequence, 1 << 31)), ProtocolError, "announced"),
        (
            lambda e, h: e._write(HEADER.pack(4, 1, 0, 2, h.sequence, 48) + b"abc") or e.close(),
            LinkError,
            "closed the connection",
        ),
        (lambda e, h: e._write(b"abc") or e.close(), LinkError, "closed the connection"),
        (lambda e, h: e.close(), LinkError, "closed the connection"),
        (lambda e, h: e.abort(), LinkError, "closed the connection"),
        (
            lambda e, h: channel.socket.socket.sendall(e._sock, b"not TLS at all, sorry"),
            LinkError,
            "encrypted",
        ),
    ],
)
def test_a_bad_answer_ends_the_link_for_good(home, identity, answer, error, says):
    with Pair(home, identity) as pair:
        with pair.answering(answer), pytest.raises(error, match=says):
            pair.link.exchange(0, rows(2))
        assert not pair.link.alive
        with pytest.raises(LinkError, match="is closed"):
            pair.link.exchange(0, rows(2))


def test_an_answer_sent_twice_is_refused_the_second_time(home, identity):
    def twice(edge: Channel, header) -> None:
        result(edge, header)
        result(edge, header)

    with Pair(home, identity) as pair, pair.answering(twice):
        pair.link.exchange(0, rows(2))
        with pytest.raises(ProtocolError, match="does not belong"):
            pair.link.exchange(0, rows(2))


@pytest.mark.parametrize("partly", [b"", HEADER.pack(4, 1, 0, 2, 1, 48), HEADER.pack(4, 1, 0, 2, 1, 48) + b"abc"])
def test_a_stalled_edge_is_given_up(home, identity, partly):
    with Pair(home, identity, timeout=0.2) as pair, pair.answering(lambda e, h: e._write(partly)):
        with pytest.raises(LinkError, match=r"did not answer within 0\.2 s"):
            pair.link.exchange(0, rows(2))
        assert not pair.link.alive


def test_a_dripping_edge_is_given_up(home, identity):
    def drip(edge: Channel, header) -> None:
        with contextlib.suppress(LinkError):
            edge._write(HEADER.pack(Kind.RESULT, 1, 0, 2, header.sequence, 48))
            for _ in range(47):
                edge._write(b"\0")
                time.sleep(0.1)

    silent = pytest.raises(LinkError, match="did not answer")
    with Pair(home, identity, timeout=0.3) as pair, pair.answering(drip), silent:
        pair.link.exchange(0, rows(2))


def test_a_dripping_header_is_given_up(home, identity):
    def drip(edge: Channel, header) -> None:
        with contextlib.suppress(LinkError):
            for byte in HEADER.pack(Kind.RESULT, 1, 0, 2, header.sequence, 48):
                edge._write(bytes([byte]))
                time.sleep(0.1)

    with Pair(home, identity, timeout=0.3) as pair, pair.answering(drip):
        started = time.monotonic()
        with pytest.raises(LinkError, match="did not answer"):
            pair.link.exchange(0, rows(2))
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
            pair.link.exchange(0, rows(2))
        timer.join(10)


def test_a_cheating_edge_is_cut_off_and_no_text_of_it_appears(home, identity):
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
from sliplm.edge.worker import ATTEMPTS, EdgeWorker
EdgeWorker(make_engine(), sys.argv[1], sys.argv[2]).run()
"""


def test_an_edge_killed_in_the_middle_is_noticed_at_once(home, identity):
    here = Path(__file__).parent
    with serving(home, FakeEngine(0.02)) as server:
        where = "{}:{}".format(*server.address)
        process = subprocess.Popen([sys.executable, "-c", EDGE, where, str(identity), str(here), str(here.parent)])
        try:
            the_link(server)
            client = EdgeWorker(make_engine(), where, identity)
            with pytest.raises(LinkError, match="generation stopped: "):
                for i, chunk in enumerate(client.generate(ask(words=10_000))):
                    assert chunk.finish_reason is None
                    if i == 3:
                        os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait(10)
        wait_until(lambda: not server.links())


# --- the trusted side misbehaves ------------------------------------------------------------------


@contextlib.contextmanager
def scripted(home: Path, script, role_context=tls.server_context):
    """A trusted side that greets properly and then does `script(channel)`, for every connection."""
    context = role_context(home)
    seen: list[BaseException] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve() -> None:
            while not stop.is_set():
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    continue
                try:
                    c = Channel(context.wrap_socket(sock, server_side=True), "the edge", 10)
                    c.read(c.receive())
                    c.send(Kind.WELCOME, frames.pack_welcome(Welcome(1, DIGEST, "scripted")))
                    c.version = 1
                    script(c)
                    c.close(drain=True)
                except (LinkError, OSError) as error:
                    seen.append(error)

        with running(serve, stop.set):
            yield listener.getsockname()[:2]


@pytest.mark.parametrize(
    ("send", "says"),
    [
        (lambda c: c._write(HEADER.pack(3, 1, 9, 1, 1, 16)), "no group 9"),
        (lambda c: c._write(HEADER.pack(3, 1, 0, 1, 1, 32)), "rows of 4 numbers"),
        (lambda c: c._write(HEADER.pack(3, 1, 0, 1024, 1, 256 << 20)), "rows of 4 numbers"),
        (lambda c: c._write(HEADER.pack(3, 1, 0, 1025, 1, 1025 * 16)), "1025 rows"),
        (lambda c: c._write(HEADER.pack(3, 1, 0, 1, 1, 16) + b"\xff" * 16), "outside the field"),
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


# --- who may connect ------------------------------------------------------------------------------


def refused(server, identity_or_context, error, says, digest=DIGEST) -> None:
    context = identity_or_context
    if isinstance(context, Path):
        context = tls.client_context(context)
    with pytest.raises(error, match=says):
        connect(server.address, context, Role.WORK, digest, 10)


def test_another_authority_s_edge(home, identity, tmp_path):
    stranger = enrol(tmp_path / "elsewhere")
    end = "-----END CERTIFICATE-----\n"
    mixed = tmp_path / "mixed.pem"  # a stranger who knows our authority's certificate
    mixed.write_text(stranger.read_text().partition(end)[0] + end + identity.read_text().partition(end)[2])
    with serving(home) as server:
        refused(server, stranger, IdentityError, "the trusted side's certificate was issued by another authority")
        refused(server, mixed, IdentityError, "this side's certificate was issued by another authority")


def test_an_expired_edge(home, identity, tmp_path):
    old = tmp_path / "old.pem"
    issue(home, old, days=-1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls._finish(context, old, authority.server_files(home)[1])  # past the edge's own check
    with serving(home) as server:
        refused(server, context, IdentityError, "has expired")


def test_an_expired_trusted_side(home, identity, monkeypatch):
    monkeypatch.setattr(authority, "SERVER_DAYS", -1)
    with serving(home) as server:
        refused(server, identity, IdentityError, "the trusted side's certificate has expired")


def test_an_edge_without_a_certificate(home):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.server_files(home)[1].decode())
    with serving(home) as server:
        refused(server, context, IdentityError, "requires a certificate")


def test_an_edge_that_was_never_registered(home, tmp_path):
    issue(home, tmp_path / "x.pem")
    with serving(home) as server:
        refused(server, tmp_path / "x.pem", IdentityError, "not enrolled")


def test_a_server_s_certificate_is_no_edge_s(home, tmp_path):
    path, ca = authority.server_files(home)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls._finish(context, path, ca)
    with serving(home) as server:
        refused(server, context, IdentityError, "wrong kind")


def test_an_edge_cannot_pose_as_the_trusted_side(home, identity):
    def as_edge(_: Path) -> ssl.SSLContext:
        return tls._finish(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), identity, authority.server_files(home)[1])

    with scripted(home, lambda c: None, as_edge) as address:
        with pytest.raises(IdentityError, match=r"wrong kind|does not belong to a trusted side"):
            connect(address, tls.client_context(identity), Role.WORK, DIGEST, 10)
        with pytest.raises(IdentityError):
            EdgeWorker(make_engine(), address, identity).run()


class OnPath:
    """Relays to `target`, or answers every handshake with a plaintext alert, as anybody on the way can."""

    ALERT = bytes([21, 3, 3, 0, 2, 2, 45])  # certificate expired

    def __init__(self, target=None) -> None:
        self.target, self.attempts = target, 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()[:2]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                edge, _ = self._listener.accept()
                self.attempts += 1
                if self.target is None:
                    edge.recv(4096)
                    edge.sendall(self.ALERT)
                    channel.drain_socket(edge)
                    edge.close()
                    continue
                trusted = socket.create_connection(self.target, 10)
                self._open += [edge, trusted]
                for a, b in ((edge, trusted), (trusted, edge)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)

    def attack(self) -> None:
        self.target = None
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_a_forged_alert_ends_no_worker_that_was_connected(home, identity):
    with (
        serving(home) as server,
        contextlib.closing(OnPath(server.address)) as path,
        working(path.address, identity) as worker,  # which fails if `run` raises
    ):
        path.attack()
        wait_until(lambda: path.attempts > ATTEMPTS + 2, 30)
        path.target = server.address
        assert worker.connected.wait(10)


def test_a_worker_that_never_was_connected_gives_up_soon_and_says_why(home, identity):
    with contextlib.closing(OnPath()) as path, pytest.raises(IdentityError, match="has expired"):
        EdgeWorker(make_engine(), path.address, identity).run()
    assert path.attempts == ATTEMPTS


def test_a_passing_failure_of_the_handshake_is_tried_again(home, identity):
    with serving(home) as server, contextlib.closing(OnPath()) as path:
        worker = EdgeWorker(make_engine(), path.address, identity)
        with running(worker.run, worker.stop) as raised:
            wait_until(lambda: path.attempts >= 2)
            path.target = server.address
            assert worker.connected.wait(10), raised


def test_an_identity_that_expires_on_the_way_is_final_at_once(home, identity):
    with contextlib.closing(OnPath()) as path:
        worker = EdgeWorker(make_engine(), path.address, identity)
        issue(home, identity, days=-1)
        with pytest.raises(IdentityError, match="enrol this device again"):
            worker.run()
        assert path.attempts == 1


def test_older_tls_is_refused(home, identity):
    context = tls.client_context(identity)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with serving(home) as server:
        refused(server, context, LinkError, "the encrypted connection to the trusted side failed")


def test_a_revoked_edge_is_refused_and_its_worker_stops(home, identity):
    authority.revoke_device(home, "laptop")
    with serving(home) as server:
        refused(server, identity, IdentityError, "was revoked")
        with pytest.raises(IdentityError, match="was revoked"):
            EdgeWorker(make_engine(), server.address, identity).run()


def test_revoking_cuts_a_connected_edge_off(home, identity):
    with serving(home, keepalive=0.1) as server:
        worker = EdgeWorker(make_engine(), server.address, identity)
        with running(worker.run, worker.stop) as raised:
            assert worker.connected.wait(10)
            authority.revoke_device(home, "laptop")
            wait_until(lambda: bool(raised))
    assert isinstance(raised[0], IdentityError)


def test_halves_of_different_splits(home, identity):
    with serving(home, digest=bytes(32)) as server:
        refused(server, identity, BundleError, "belongs to another split")
        with pytest.raises(BundleError, match="belongs to another split"):
            EdgeWorker(make_engine(), server.address, identity).run()


def test_the_edge_checks_the_digest_itself(home, identity):
    with scripted(home, lambda c: None) as address, pytest.raises(BundleError):
        connect(address, tls.client_context(identity), Role.WORK, bytes(32), 10)


def test_no_common_version(home, identity, monkeypatch):
    with serving(home) as server:
        pack = frames.pack_hello
        monkeypatch.setattr(frames, "pack_hello", lambda hello: pack(Hello(2, 3, hello.role, hello.digest)))
        refused(server, identity, ProtocolError, "versions 2 to 3")
        with pytest.raises(ProtocolError, match="update the older one"):
            EdgeWorker(make_engine(), server.address, identity).run()


# --- hostile input to the server ------------------------------------------------------------------


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
    monkeypatch.setattr("sliplm.trusted.server.HANDSHAKE_SECONDS", 0.2)
    with serving(home) as server, socket.create_connection(server.address, 10) as sock:
        assert sock.recv(1) == b""
        context = tls.client_context(identity)
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
def test_garbage_in_frames_disturbs_nobody(live, data, greet):
    server, worker, context = live
    with context.wrap_socket(socket.create_connection(server.address, 10), server_hostname="sliplm-trusted") as sock:
        if greet:
            hello = frames.pack_hello(Hello(1, 1, Role.REQUEST, DIGEST))
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


def test_connections_are_limited_per_device_and_in_all(home, identity):
    other = enrol(home, "other")
    context = tls.client_context(identity)
    with serving(home, max_connections=3, max_per_device=2) as server:
        mine = [connect(server.address, context, Role.WORK, DIGEST, 10)[0] for _ in range(2)]
        refused(server, identity, LinkError, "2 connections already")
        theirs = connect(server.address, tls.client_context(other), Role.WORK, DIGEST, 10)[0]
        refused(server, other, LinkError, "too many connections")
        for each in (*mine, theirs):
            each.close()


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
        wait_until(lambda: len(server._strangers) == 8)
        assert text(worker)
        assert flood[0].recv(1) == b""  # the oldest made room
        for sock in flood:
            sock.close()


def test_whoever_floods_the_server_evicts_itself(home):
    with contextlib.closing(TrustedServer(FakeEngine(), DIGEST, SHAPES, home, max_strangers=4)) as server:
        socks = []
        for i, host in enumerate(["10.0.0.1", "2001:db8::1", "2001:db8::2", "2001:db8::3"]):
            socks.append(server._context.wrap_socket(socket.socket(), server_side=True))
            server._strangers[threading.Thread(name=str(i))] = (socks[-1], network(host))
        server._evict()
        assert [t.name for t in server._strangers] == ["0", "2", "3"]
        server._strangers.clear()
        for sock in socks:
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
        assert text(worker) and not server._strangers


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


# --- failures in the middle, and the way back ------------------------------------------------------


def test_a_request_without_a_worker(home, identity):
    with serving(home, worker_wait=0.1) as server, pytest.raises(LinkError, match="no worker connected"):
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


def test_a_device_only_uses_its_own_worker(home, identity):
    other = enrol(home, "other")
    with serving(home, worker_wait=0.1) as server, working(server, identity):
        client = EdgeWorker(make_engine(), server.address, other)
        with pytest.raises(LinkError, match="no worker connected"):
            text(client)


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
        with pytest.raises(LinkError, match="its log says why") as caught:
            text(worker, ask(prompt))
        assert "layers.3" not in str(caught.value)
        assert text(worker)
    assert "secret" not in caplog.text and "boom" not in caplog.text
    assert ("RuntimeError in link_fakes.py" if prompt == "boom" else "layers.3") in caplog.text


def test_an_engine_that_stops_early_is_not_taken_for_done(home, identity):
    engine = FakeEngine()
    engine.generate = lambda request, link: iter(())  # type: ignore[method-assign]
    with serving(home, engine) as server, working(server, identity) as worker, pytest.raises(LinkError):
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
