"""The emulated network: what comes through it, how late, and how it ends; and plans measured over it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sliplm.planner import network as under_test
from sliplm.planner import shapes
from sliplm.planner.costs import Network, Split
from sliplm.planner.network import emulated
from sliplm.planner.predict import Work, predict
from sliplm.planner.speeds import USUAL
from sliplm.speed.runner import Protected
from sliplm.split.model import Options, split_model

SHORT = Network(round_trip=1e-3, bandwidth=50e6)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


def address(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


def connect(where: str) -> socket.socket:
    host, port = where.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def read(sock: socket.socket) -> bytes:
    """All that comes until the other end has no more."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_without_delay_there_is_no_proxy(listener: socket.socket) -> None:
    with emulated(address(listener), Network()) as where:
        assert where == address(listener)
    assert under_test.ping(Network()) == 0.0


def test_bytes_come_through_whole_and_in_order_both_ways(listener: socket.socket) -> None:
    there, back = bytes(range(256)) * 3000, bytes(reversed(range(256))) * 2000
    got: list[bytes] = []

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            got.append(read(peer))
            peer.sendall(back)

    thread = threading.Thread(target=answer)
    thread.start()
    with emulated(address(listener), SHORT) as where, connect(where) as sock:
        for begin in range(0, len(there), 50_000):
            sock.sendall(there[begin : begin + 50_000])
        sock.shutdown(socket.SHUT_WR)  # one way may end before the other
        assert read(sock) == back
    thread.join(30)
    assert got == [there]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the proxy wants to wait, which no busy machine changes; it goes on at once."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def at_once(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    return found


def test_each_way_waits_for_half_the_round_trip(listener: socket.socket, asked: list[float]) -> None:
    with emulated(address(listener), Network(1e6)) as where, connect(where) as sock:
        peer, _ = listener.accept()
        with peer:
            sock.sendall(b"x")
            assert peer.recv(1) == b"x"
            peer.sendall(b"y")
            assert sock.recv(1) == b"y"
    assert len(asked) >= 2 and all(4e5 < seconds <= 5e5 for seconds in asked)  # the ends of both ways may come, too


def test_a_narrow_wire_is_busy_with_what_went_before(listener: socket.socket, asked: list[float]) -> None:
    with emulated(address(listener), Network(bandwidth=1e-3)) as where, connect(where) as sock:
        peer, _ = listener.accept()
        with peer:
            for i in range(3):
                sock.sendall(bytes(100))
                assert len(peer.recv(100)) == 100, i
    assert asked[:3] == pytest.approx([1e5, 2e5, 3e5], rel=0.1)  # the end of the connection may come, too


def test_when_one_end_goes_so_does_the_other(listener: socket.socket) -> None:
    with emulated(address(listener), SHORT) as where, connect(where) as sock:
        peer, _ = listener.accept()
        peer.close()
        assert not sock.recv(1)
    with emulated(address(listener), SHORT) as where:
        with connect(where):
            peer, _ = listener.accept()
        with peer:
            peer.settimeout(30)
            assert not peer.recv(1)


def test_the_network_s_end_ends_connections(listener: socket.socket) -> None:
    with emulated(address(listener), SHORT) as where:
        sock = connect(where)
        peer, _ = listener.accept()
    for end in (sock, peer):
        end.settimeout(30)
        with end, contextlib.suppress(ConnectionResetError):
            assert not end.recv(1)
    with pytest.raises(OSError, match="refused"):
        connect(where)


def test_where_nobody_listens_the_connection_ends(listener: socket.socket) -> None:
    where = address(listener)
    listener.close()
    with emulated(where, SHORT) as through, connect(through) as sock, contextlib.suppress(ConnectionResetError):
        assert not sock.recv(1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["all", "first:1", "trusted:1"])
def test_a_plan_measured_over_it_makes_the_predicted_round_trips(plan: str, tiny: Path, tmp_path: Path) -> None:
    """As `bench/plan.py` does it; with `trusted:1` there are no pads to wait for."""
    split_model(str(tiny), tmp_path / "split", Options(rank=4, plan=plan), check=False)
    (expected,) = predict(shapes.read(str(tiny)), [plan], Work(prompt=8), Split(4, 2), USUAL, SHORT)
    with ExitStack() as running:

        def way(target: str) -> str:
            return running.enter_context(emulated(target, SHORT))

        runner = Protected(tmp_path / "split", running, clocks=False, way=way)
        assert runner.decode(6)["spent"]["exchanges"] == expected.round_trips
        assert runner.prefill(16)["spent"]["exchanges"] == expected.round_trips
