"""What the link's tests share: tiny exact matrices, an engine that only exchanges, servers and workers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sqlalchemy

from sliplm.edge.engine import EdgeEngine
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import SlipError, VerificationError
from sliplm.field import P
from sliplm.protocol import authority
from sliplm.protocol.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.trusted.server import TrustedServer

DIGEST = bytes(range(32))
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


def make_engine(kind: type[FakeMatrix] = FakeMatrix, digest: bytes = DIGEST) -> EdgeEngine:
    return EdgeEngine([kind(m, k, seed) for seed, (m, k) in enumerate(SHAPES)], digest)


class FakeEngine:
    """Yields `max_tokens` words after `delay` seconds each; every word costs an exchange, which is checked.

    The prompts "boom" and "layer" fail; `cancelled` is set when an iterator is closed early.
    """

    capacity = 16

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.cancelled = threading.Event()
        self.requests: list[GenerateRequest] = []
        self._truth = make_engine()

    def model_name(self) -> str:
        return "fake-model"

    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        self.requests.append(request)
        rng = np.random.default_rng()
        for i in range(request.max_tokens):
            if request.prompt == "boom":
                raise RuntimeError("secret text of an exception")
            if request.prompt == "layer":
                raise SlipError("model.layers.3 is broken")
            x = rng.integers(0, P, (2, SHAPES[0][1])).astype(np.uint32)
            if not np.array_equal(link.exchange(0, x), self._truth.product(0, x)):
                raise VerificationError("an answer of the edge is wrong")
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
def working(server_or_address, identity: Path, engine: EdgeEngine | None = None, **options) -> Iterator[EdgeWorker]:
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


def enrol(directory: Path, name: str = "laptop") -> Path:
    identity = directory.parent / f"{directory.name}-{name}.pem"
    authority.add_device(directory, name, identity)
    return identity


def break_registry(patch, server: TrustedServer) -> None:
    """The server's registry answers nothing until `patch`, a MonkeyPatch, is undone."""

    def broken(*_, **__):
        raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("disk I/O error"))

    patch.setattr(server._registry._db, "_engine", SimpleNamespace(begin=broken))
    patch.setattr(server._registry._db, "_reader", SimpleNamespace(connect=broken))
