"""Helpers over real sockets: who may be one, what it makes, and what comes of a lie, a death and a revocation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from link_fakes import (
    DIGEST,
    SHAPES,
    FakeEngine,
    FakeMatrix,
    WrongMatrix,
    list_devices,
    make_engine,
    revoke_device,
    running,
    serving,
    the_link,
    wait_until,
    working,
)

from sliplm.edge.helper import HelperWorker
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, IdentityError, LinkError, MismatchError, VerificationError
from sliplm.exchange.check import secrets
from sliplm.exchange.operator import Operator
from sliplm.exchange.step import exchange
from sliplm.pads.pool import Pool
from sliplm.protocol import tls
from sliplm.protocol.connect import connect
from sliplm.protocol.frames import HEADER, Kind, PadsWanted, Role, pack_pads
from sliplm.registry import authority
from sliplm.serve.helpers import HelperLink, Helpers
from sliplm.serve.server import TrustedServer

torch = pytest.importorskip("torch")


class SlowMatrix(FakeMatrix):
    """A helper that takes its time, once it is told to."""

    stalled = threading.Event()

    def product(self, x: Any, *, out: Any = None, threads: int = 0) -> Any:
        if self.stalled.is_set():
            time.sleep(3)
        return super().product(x, out=out)


class Shifted(FakeMatrix):
    """A helper whose first row's image is right only for another row."""

    def product(self, x: Any, *, out: Any = None, threads: int = 0) -> Any:
        return np.roll(super().product(x), 1, axis=0)


def operators() -> list[Operator]:
    ops = []
    for number, shape in enumerate(SHAPES):
        q = FakeMatrix(*shape, number).q.astype(np.int8)
        norm = float(np.linalg.norm(q.astype(float), axis=1).max())
        ops.append(Operator(number, shape, norm, np.ones((1, len(q)), np.float32), None, None, *secrets(q)))
    return ops


OPS = operators()


def enrol(home: Path, name: str, party: str, helper: bool = True, edge: bool = False) -> Path:
    identity = home.parent / f"{home.name}-{name}.pem"
    authority.add_device(home, name, identity, party=party, edge=edge, helper=helper)
    return identity


@contextlib.contextmanager
def helping(server: TrustedServer, identity: Path, matrix: type[FakeMatrix] = FakeMatrix) -> Iterator[HelperWorker]:
    helper = HelperWorker(make_engine(matrix), server.address, identity)
    with running(helper.run, helper.stop):
        assert helper.connected.wait(10)
        yield helper


@contextlib.contextmanager
def with_pool(home: Path, depth: int = 40, patience: float = 5.0) -> Iterator[tuple[TrustedServer, Pool]]:
    pool = Pool(SHAPES, depth, batch=4, patience=patience)
    pool.expected = True
    with serving(home, pads=pool) as server:
        yield server, pool


def product(pool: Pool, server: TrustedServer, group: int = 0, rows: int = 3) -> bool:
    """Whether an exchange over the newest link, with pads of `pool`, gives Q x."""
    op, x = OPS[group], np.random.default_rng().normal(size=(rows, SHAPES[group][1])).astype(np.float32)
    y = exchange(op, x, pool, the_link(server), lambda x: np.zeros((len(x), op.shape[0]), np.float32))
    return np.allclose(y, x @ FakeMatrix(*SHAPES[group], group).q.T, atol=1e-3)


def test_a_helper_makes_the_pads_of_an_edge_of_another_party(home: Path, identity: Path) -> None:
    rack = enrol(home, "h", "rack")
    with with_pool(home) as (server, pool), helping(server, rack) as helper, working(server, identity):
        assert pool.wait(40, 10)
        for _ in range(30):
            assert product(pool, server, 0, 3) and product(pool, server, 1, 5)
        assert product(pool, server, 0, 300)  # more than the stock: it waits for more
        (link,) = server.helpers.alive()
        wait_until(lambda: link.made >= 40 * 2 + 30 * 8)
    assert helper.counters.rows >= link.made > 0


def test_pads_of_a_party_are_not_used_with_its_own_edge(home: Path) -> None:
    both = enrol(home, "both", "acme", edge=True)
    with with_pool(home, patience=0.3) as (server, pool), helping(server, both), working(server, both):
        assert pool.wait(40, 10)
        with pytest.raises(BusyError, match="no helper of another party than this edge's"):
            product(pool, server)
        with helping(server, enrol(home, "h", "rack")):
            assert product(pool, server)


@pytest.mark.parametrize("kind", [WrongMatrix, Shifted])
def test_a_helper_that_lies_is_found_and_no_exchange_fails(home: Path, identity: Path, kind: Any) -> None:
    liar, honest = enrol(home, "liar", "x"), enrol(home, "honest", "y")
    with with_pool(home) as (server, pool), working(server, identity), helping(server, liar, kind):
        assert pool.wait(40, 10)
        with helping(server, honest):
            wait_until(lambda: len(server.helpers.alive()) == 2)
            for _ in range(40):
                assert product(pool, server, 0) and product(pool, server, 1)
    assert {d.name: d.state for d in list_devices(home)} == {
        "laptop": "active",
        "liar": "suspended",
        "honest": "active",
    }
    assert server.helpers.lies == 1


def test_an_edge_that_lies_does_not_cost_the_helper_its_name(home: Path, identity: Path) -> None:
    with with_pool(home) as (server, pool), helping(server, enrol(home, "h", "rack")):
        worker = EdgeWorker(make_engine(WrongMatrix), server.address, identity)
        with running(worker.run, worker.stop):
            link = the_link(server)
            with pytest.raises(VerificationError):
                product(pool, server)
            assert not link.alive and len(server.helpers.alive()) == 1 and server.helpers.lies == 0


def test_when_both_lie_alike_nothing_wrong_passes(home: Path, identity: Path) -> None:
    """Errors that cancel leave the product right, and those that do not are seen."""
    with with_pool(home) as (server, pool), helping(server, enrol(home, "h", "rack"), WrongMatrix):
        worker = EdgeWorker(make_engine(WrongMatrix), server.address, identity)
        with running(worker.run, worker.stop):
            for _ in range(5):
                try:
                    the_link(server)
                    assert product(pool, server)
                except LinkError:
                    return


def test_what_a_stalled_helper_owes_is_made_by_another_within_two_seconds(home: Path, identity: Path) -> None:
    slow, quick = enrol(home, "slow", "x"), enrol(home, "quick", "x")
    SlowMatrix.stalled.clear()
    with (
        with_pool(home, patience=10) as (server, pool),
        working(server, identity),
        helping(server, slow, SlowMatrix),
        helping(server, quick),
    ):
        assert pool.wait(40, 10)
        SlowMatrix.stalled.set()
        start = time.monotonic()
        for _ in range(6):
            assert product(pool, server, 0, 50)
        assert time.monotonic() - start < 12  # not 3 s for each
        SlowMatrix.stalled.clear()


def test_a_helper_that_is_killed_is_replaced(home: Path, identity: Path) -> None:
    first, second = enrol(home, "first", "x"), enrol(home, "second", "x")
    with with_pool(home, patience=10) as (server, pool), working(server, identity), helping(server, second):
        for _ in range(3):
            with helping(server, first) as helper:
                wait_until(lambda: len(server.helpers.alive()) == 2)
                assert product(pool, server, 0, 60)
                helper._channel.abort()
                assert product(pool, server, 0, 60)


def test_a_revoked_helper_is_cut_off_and_its_pads_are_forgotten(home: Path, identity: Path) -> None:
    with with_pool(home) as (server, pool):
        helper = HelperWorker(make_engine(), server.address, enrol(home, "h", "rack"))
        with running(helper.run, helper.stop) as raised:
            assert pool.wait(40, 10)
            revoke_device(home, "h")
            wait_until(lambda: pool.level == 0, 3)
            wait_until(lambda: bool(raised))
        assert isinstance(raised[0], IdentityError)


def test_a_helper_that_left_is_revoked_all_the_same(home: Path, identity: Path) -> None:
    with with_pool(home) as (server, pool):
        with helping(server, enrol(home, "h", "rack")):
            assert pool.wait(40, 10)
        wait_until(lambda: not server.helpers.alive())
        assert pool.level == 40  # they are as good as before
        revoke_device(home, "h")
        wait_until(lambda: pool.level == 0, 3)


class Silent:
    """A channel that nobody answers."""

    version = 3

    def __init__(self) -> None:
        self.looks = 0

    def set_timeout(self, _: float) -> None: ...

    def abort(self) -> None: ...

    def peer_left(self) -> bool:
        self.looks += 1
        return False


def test_a_link_that_was_dismissed_waits_and_does_not_spin() -> None:
    pool, channel = Pool(SHAPES, depth=0), Silent()
    device: Any = SimpleNamespace(fingerprint="f", party="x", name="h")
    link = HelperLink(channel, device, SHAPES, lambda _: None)  # type: ignore[arg-type]
    pool.hire(link)
    with running(lambda: link.serve(pool, 60, threading.Event()), link.close):
        pool.drop("f")
        time.sleep(0.5)
    assert channel.looks < 10


def test_a_connection_that_comes_while_its_device_is_cut_off_leaves_no_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(SHAPES, depth=8)
    pool.expected = 1
    helpers = Helpers(SHAPES, pool, lambda *_: None, 5, 5, threading.Event())
    device: Any = SimpleNamespace(fingerprint="f", party="x", name="h")
    hold, late = threading.Event(), threading.Event()

    def serve(link: HelperLink, work: Pool, *_: Any) -> None:
        if late.is_set():
            while (job := work.job(link, 0)) is not None:
                work.deliver(job, np.zeros((job.count, SHAPES[job.group][0]), np.uint32))
        hold.wait(20)

    monkeypatch.setattr(HelperLink, "serve", serve)
    threads = [threading.Thread(target=helpers.serve, args=(Silent(), device)) for _ in range(2)]
    threads[0].start()
    wait_until(lambda: len(helpers.alive()) == 1)
    drop = pool.drop

    def drop_and_then_another_comes(name: str) -> int:
        dropped = drop(name)
        if not late.is_set():
            late.set()
            threads[1].start()
            wait_until(lambda: pool.level == 8)
        return dropped

    monkeypatch.setattr(pool, "drop", drop_and_then_another_comes)
    helpers.close("f")  # it is suspended
    helpers.close("f")  # the watch looks again
    hold.set()
    for thread in threads:
        thread.join(10)
    assert pool.level == 0


def test_a_connection_that_is_dismissed_with_those_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that the owner lets in again at once: one that waited for work in vain would wait for ever."""
    pool = Pool(SHAPES, 8, batch=4)
    helpers = Helpers(SHAPES, pool, lambda *_: None, 5, 5, threading.Event())
    device: Any = SimpleNamespace(fingerprint="f", party="x", name="h")
    monkeypatch.setattr(HelperLink, "serve", lambda link, *_: link._ended.wait(20))
    threads = [threading.Thread(target=helpers.serve, args=(Silent(), device)) for _ in range(2)]
    threads[0].start()
    wait_until(lambda: bool(pool._makers))
    first, drop = set(pool._makers), pool.drop

    def another_comes_and_then_drop(name: str) -> int:
        threads[1].start()
        wait_until(lambda: bool(set(pool._makers) - first))
        return drop(name)

    monkeypatch.setattr(pool, "drop", another_comes_and_then_drop)
    helpers.close("f")
    for thread in threads:
        thread.join(5)
    assert not pool._makers and not any(thread.is_alive() for thread in threads)


def refusal(server: TrustedServer, identity: Path, role: Role, digest: bytes = DIGEST) -> Exception:
    try:
        connect(server.address, tls.client_context(identity), role, digest, 10)[0].close()
    except LinkError as error:
        return error
    except (IdentityError, MismatchError) as error:
        return error
    raise AssertionError("it was let in")


def test_each_role_needs_its_enrolment(home: Path, identity: Path) -> None:
    with with_pool(home) as (server, _):
        helper = enrol(home, "h", "rack")
        for role in (Role.WORK, Role.REQUEST):
            assert "enrolled as a helper and cannot be an edge" in str(refusal(server, helper, role))
        assert "enrolled as an edge and cannot be a helper" in str(refusal(server, identity, Role.HELP))
        assert isinstance(refusal(server, helper, Role.HELP, bytes(32)), MismatchError)


def test_a_trusted_side_that_makes_its_own_pads_takes_no_helper(home: Path, identity: Path) -> None:
    with serving(home, FakeEngine()) as server:
        assert "makes its own one-time pads" in str(refusal(server, enrol(home, "h", "rack"), Role.HELP))


def wanted(group: int, first: int, rows: int) -> bytes:
    return HEADER.pack(Kind.PADS, 3, group, 0, 1, 40) + pack_pads(PadsWanted(bytes(32), first, rows))


@pytest.mark.parametrize("data", [wanted(7, 0, 1), wanted(0, 0, 0), wanted(0, 0, 1025), wanted(0, 2**32 - 1, 2)])
def test_a_helper_refuses_what_no_trusted_side_asks(home: Path, data: bytes) -> None:
    """It says so, and comes back."""
    with with_pool(home, depth=0) as (server, _):
        helper = HelperWorker(make_engine(), server.address, enrol(home, "h", "rack"))
        with running(helper.run, helper.stop):
            assert helper.connected.wait(10)
            wait_until(lambda: bool(server.helpers.alive()))
            (link,) = server.helpers.alive()
            link._channel._write(data)
            wait_until(lambda: helper.counters.connections >= 2)


@pytest.mark.parametrize("how", ["another sequence", "fewer rows", "out of turn"])
def test_images_that_do_not_belong_to_the_question_end_the_helper(home: Path, how: str) -> None:
    with with_pool(home) as (server, pool):
        context = tls.client_context(enrol(home, "h", "rack"))
        channel, _ = connect(server.address, context, Role.HELP, DIGEST, 10)
        header = channel.receive()
        wish = channel.read(header)
        rows = int.from_bytes(wish[36:40], "little") - (how == "fewer rows")
        staged = channel.stage(rows, SHAPES[header.group][0])
        staged[:] = 1
        kind = Kind.RESULT if how == "out of turn" else Kind.IMAGES
        channel.send_staged(kind, header.group, header.sequence + (how == "another sequence"), staged)
        wait_until(lambda: not server.helpers.alive())
        assert pool.level == 0
        channel.close()
