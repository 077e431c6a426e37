"""What the link's tests share: tiny exact matrices, an engine that only exchanges, servers and workers."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import LinkError, SlipError, VerificationError
from sliplm.exchange.link import Link, Router
from sliplm.field import P
from sliplm.protocol import frames, tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.connect import connect
from sliplm.protocol.frames import Kind, Role, Welcome
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.protocol.openssl import Context
from sliplm.protocol.remote import RemoteLink
from sliplm.protocol.session import Session, secure
from sliplm.registry import Device, authority
from sliplm.serve.server import TrustedServer

DIGEST = bytes(range(32))
VERSION = frames.VERSIONS[1]
SHAPES = [(6, 4), (5, 8)]


class FakeMatrix:
    """An IntMatrix by the book."""

    nbytes = 0

    def __init__(self, rows: int, cols: int, seed: int) -> None:
        self.rows, self.cols = rows, cols
        self.q = np.random.default_rng(seed).integers(-128, 128, (rows, cols))

    def product(self, x, *, out=None, threads=0):
        y = (x.astype(np.int64) @ self.q.T % P).astype(np.uint32)
        if out is None:
            return y
        out[:] = y
        return out


class WrongMatrix(FakeMatrix):
    """An edge that cheats."""

    def product(self, x, *, out=None, threads=0):
        y = super().product(x, out=out)
        y[0, 0] ^= 1
        return y


def make_engine(kind: type[FakeMatrix] = FakeMatrix, digest: bytes = DIGEST) -> Multiplier:
    return Multiplier([kind(m, k, seed) for seed, (m, k) in enumerate(SHAPES)], digest)


OP = SimpleNamespace(number=0, shape=SHAPES[0], rows=128, scales=np.ones((1, SHAPES[0][0])))
"""What a pool of edges asks of an operator."""

PADS = SimpleNamespace(ready=lambda group, edge: True)


def answer_of(link: Link, group: int, x: np.ndarray) -> np.ndarray:
    """The answer of an exchange beside which there is nothing else to do."""
    return link.exchange(group, x, lambda: None)[0]


class FakeEngine:
    """Yields `max_tokens` words after `delay` seconds each; every word costs an exchange, which is checked.

    The prompts "boom" and "layer" fail; `cancelled` is set when an iterator is closed early.
    """

    capacity = 16
    shows = False

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.cancelled = threading.Event()
        self.requests: list[GenerateRequest] = []
        self._truth = make_engine()

    def model_name(self) -> str:
        return "fake-model"

    def _step(self, op: Any, x: np.ndarray, pads: Any, link: Link, own: Any) -> np.ndarray:
        """An exchange without masks, checked by the truth."""
        y = answer_of(link, op.number, x)
        if not np.array_equal(y, self._truth.product(op.number, x)):
            link.close()
            raise VerificationError("an answer of the edge is wrong")
        return own(x) + y

    def generate(self, request: GenerateRequest, link: Link | Router) -> Iterator[Chunk]:
        self.requests.append(request)
        rng = np.random.default_rng()
        for i in range(request.max_tokens):
            if request.prompt == "boom":
                raise RuntimeError("secret text of an exception")
            if request.prompt == "layer":
                raise SlipError("model.layers.3 is broken")
            x = rng.integers(0, P, (2, SHAPES[0][1])).astype(np.uint32)
            link.run(self._step, OP, x, PADS, lambda x: np.zeros((len(x), SHAPES[0][0])))
            time.sleep(self.delay)
            last = i + 1 == request.max_tokens
            try:
                yield Chunk(f"word{i} ", "length" if last else None, 3, i + 1)
            except GeneratorExit:
                self.cancelled.set()
                raise


@contextlib.contextmanager
def running(target: Callable[[], None], stop: Callable[[], None]) -> Iterator[list[BaseException]]:
    """`target` in a thread, and in the list what it raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            target()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield raised
    finally:
        stop()
        thread.join(15)
        assert not thread.is_alive(), "a thread did not stop"


@contextlib.contextmanager
def serving(directory: Path, engine: FakeEngine | None = None, **options) -> Iterator[TrustedServer]:
    digest = options.pop("digest", DIGEST)
    server = TrustedServer(engine or FakeEngine(), digest, SHAPES, directory, **options)
    with running(server.serve_forever, server.close) as raised:
        yield server
    assert not raised


@contextlib.contextmanager
def working(server_or_address, identity: Path, engine: Multiplier | None = None, **options) -> Iterator[EdgeWorker]:
    """A connected worker."""
    address = getattr(server_or_address, "address", server_or_address)
    worker = EdgeWorker(engine or make_engine(), address, identity, **options)
    with running(worker.run, worker.stop) as raised:
        assert worker.connected.wait(10), raised
        yield worker
    assert not raised, raised


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def list_devices(home: Path) -> list[Device]:
    """All that this authority ever enrolled, oldest first."""
    with authority.open_registry(home) as registry:
        return registry.devices.all()


def revoke_device(home: Path, name: str) -> Device:
    with authority.open_registry(home) as registry:
        return registry.devices.revoke(name)


def enrol(directory: Path, name: str = "laptop") -> Path:
    identity = directory.parent / f"{directory.name}-{name}.pem"
    authority.add_device(directory, name, identity)
    return identity


def issue(home: Path, identity: Path, name: str = "x", days: float = 1, usage=ExtendedKeyUsageOID.CLIENT_AUTH) -> None:
    """An identity signed by the authority, but not registered."""
    with authority._locked(home):
        ca_key, ca_cert = authority._authority(home)
    key = ec.generate_private_key(ec.SECP256R1())
    cert = authority._sign(ca_key, ca_cert, key, name, days, usage)
    identity.write_bytes(authority._pem_key(key) + authority._pem(cert) + authority._pem(ca_cert))


def break_registry(patch, server: TrustedServer) -> None:
    """The server's registry answers nothing until `patch`, a MonkeyPatch, is undone."""

    def broken(*_, **__):
        raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("disk I/O error"))

    patch.setattr(server._registry._db, "_engine", SimpleNamespace(begin=broken))
    patch.setattr(server._registry._db, "_reader", SimpleNamespace(connect=broken))


def usage(home: Path) -> list[tuple[int, int, str | None]]:
    """What the registry in `home` recorded of every request: tokens of the prompt and of the answer, and its end."""
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as db:
        return db.execute("SELECT prompt_tokens, completion_tokens, outcome FROM usage ORDER BY id").fetchall()


def rows(count: int, group: int = 0) -> np.ndarray:
    return np.random.default_rng().integers(0, P, (count, SHAPES[group][1])).astype(np.uint32)


def the_link(server: TrustedServer) -> RemoteLink:
    wait_until(lambda: bool(server.links()))
    return server.links()[-1]


def ask(prompt: str = "hi", words: int = 3) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=words)


def text(worker: EdgeWorker, request: GenerateRequest | None = None) -> str:
    return "".join(chunk.text for chunk in worker.generate(request or ask()))


def server_context(home: Path) -> Context:
    """The trusted side's, with the authority in `home`."""
    return tls.server_context(*authority.server_files(home))


def python_context(identity: Path) -> ssl.SSLContext:
    """An edge's as another program would make it, with Python's own TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity)
    _, begin, rest = identity.read_text().rpartition("-----BEGIN CERTIFICATE")
    context.load_verify_locations(cadata=begin + rest)
    return context


class Pair:
    """A trusted and an edge channel, connected by TLS over a real socket, and nobody behind them."""

    def __init__(self, home: Path, identity: Path, timeout: float = 10.0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            a = socket.create_connection(listener.getsockname(), 10)
            b = listener.accept()[0]
        sides: list[Session] = []
        server = server_context(home)
        thread = threading.Thread(target=lambda: sides.append(secure(b, server)))
        thread.start()
        edge = secure(a, tls.client_context(identity))
        thread.join(10)
        self.edge = Channel(edge, "the trusted side", timeout)
        self.trusted = Channel(sides[0], "the edge", timeout)
        self.edge.version = self.trusted.version = VERSION
        self.link = RemoteLink(self.trusted, SHAPES, "customer", timeout)

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


@contextlib.contextmanager
def scripted(home: Path, script, role_context=server_context):
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
                    c = Channel(secure(sock, context), "the edge", 10)
                    c.read(c.receive())
                    c.send(Kind.WELCOME, frames.pack_welcome(Welcome(VERSION, DIGEST, "scripted")))
                    c.version = VERSION
                    script(c)
                    c.close(drain=True)
                except (LinkError, OSError) as error:
                    seen.append(error)

        with running(serve, stop.set):
            yield listener.getsockname()[:2]


def refused(server, identity_or_context, error, says, digest=DIGEST) -> None:
    context = identity_or_context
    if isinstance(context, Path):
        context = tls.client_context(context)
    with pytest.raises(error, match=says):
        connect(server.address, context, Role.WORK, digest, 10)
