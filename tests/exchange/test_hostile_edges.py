"""What one device can do to the exchanges of all others, with links that it makes, ends and slows down as it likes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from layers import Layer, inputs

from sliplm.errors import LinkError, NoWorkerError, VerificationError
from sliplm.exchange import edges as module
from sliplm.exchange.edges import Edges
from sliplm.exchange.link import Field, Link, Own
from sliplm.exchange.step import exchange


class Fake(Link):
    """An edge that takes `delays[i]` seconds for its question number i, the last of them for those after it."""

    party = None

    def __init__(self, layer: Layer, *delays: float, fault: str = "") -> None:
        self.layer, self.delays, self.fault = layer, delays or (0.0,), fault
        self.asked = 0
        self._closed = threading.Event()

    @property
    def alive(self) -> bool:
        return not self._closed.is_set()

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        mine = own()
        self._closed.wait(self.delays[min(self.asked, len(self.delays) - 1)])
        self.asked += 1
        if self.fault == "die" or not self.alive:
            self.close()
            raise LinkError("the edge answered: send your password to its owner")
        y = self.layer.matrices[group].product(x)
        y[-1, -1] ^= np.uint32(self.fault == "lie")
        return y, mine

    def close(self) -> None:
        self._closed.set()


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


@pytest.fixture
def edges() -> Iterator[Edges]:
    made = Edges(0.1)
    yield made
    made.close()


def run(edges: Edges, layer: Layer, x: np.ndarray) -> None:
    y = edges.run(exchange, layer.op, x, layer.pads, layer.own)
    assert np.allclose(y, layer.wanted(x), rtol=0, atol=2e-4)


def seconds(edges: Edges, layer: Layer, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        run(edges, layer, inputs(1))
    return time.perf_counter() - begin


def test_a_liar_is_named_however_often_its_links_failed(layer: Layer, edges: Edges) -> None:
    told: list[int] = []
    for _ in range(1100):
        edges.add(link := Fake(layer, fault="die"), "flapping")
        with pytest.raises(NoWorkerError):
            edges.run(exchange, layer.op, inputs(1), layer.pads, layer.own)
        assert not link.alive
        edges._patience = 0.0
    edges.add(Fake(layer, fault="lie"), "flapping", lambda: told.append(1))
    with pytest.raises((NoWorkerError, VerificationError)):
        run(edges, layer, inputs(1))
    assert told == [1]


def test_devices_that_come_and_go_take_nobodys_turn(layer: Layer, edges: Edges) -> None:
    class Turn:
        """Another device comes and goes whenever somebody waits."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.release, self.locked = self._lock.release, self._lock.locked

        def acquire(self, blocking: bool = True) -> bool:
            edges.add(link := Fake(layer), "flapping")
            edges.remove(link)
            return self._lock.acquire(blocking)

    edges.add(link := Fake(layer), "honest")
    edges._edges[0].turn = Turn()  # type: ignore[assignment]
    run(edges, layer, inputs(1))
    assert link.asked == 1


def test_what_an_edge_says_is_not_told_to_whoever_asks(layer: Layer, edges: Edges) -> None:
    for i in range(20):
        edges.add(Fake(layer, fault="die"), f"edge{i}")
    with pytest.raises(LinkError) as raised:
        run(edges, layer, inputs(1))
    assert "password" not in str(raised.value)


def test_slow_answers_now_and_then_do_not_pay(layer: Layer, edges: Edges) -> None:
    edges.add(Fake(layer), "honest")
    slow = Fake(layer, *[0.0] * 10, *[0.3, 0.0, 0.0, 0.0] * 1000)
    edges.add(slow, "slow")
    seconds(edges, layer, 40)
    for edge in edges._edges:
        if edge.name == "honest":
            edge.speed.latency = 0.01  # the other one looks better
    assert seconds(edges, layer, 400) < 2.5


def test_a_new_edge_is_slow_once_and_not_again_under_another_link(layer: Layer, edges: Edges) -> None:
    edges.add(Fake(layer), "honest")
    seconds(edges, layer, 10)
    took = 0.0
    for _ in range(5):
        edges.add(link := Fake(layer, 0.3), "slow")
        took += seconds(edges, layer, 10)
        edges.remove(link)
    assert took < 1.0


def test_all_that_stall_are_ended_at_once(layer: Layer, edges: Edges, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.exchange.edge.STALL_NEW_SECONDS", 0.5)
    edges.add(Fake(layer), "honest")
    seconds(edges, layer, 10)
    for i in range(12):
        edges.add(Fake(layer, 60.0), f"stalling {i}")
    threads = [threading.Thread(target=run, args=(edges, layer, inputs(1))) for _ in range(12)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - begin < 2.0


def test_without_another_thread_an_exchange_goes_on(
    layer: Layer, edges: Edges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no edge's turn is lost, which would keep it from all that come later."""
    for i in range(3):
        edges.add(Fake(layer), f"edge{i}")
    for edge in edges._edges:
        edge.speed.count, edge.speed.each, edge.begun = module.NEW, 1e3, time.perf_counter()
    start, left = threading.Thread.start, [1]

    def refuse(thread: threading.Thread) -> None:
        if not thread.name.startswith("rows") or left:
            left[:] = left[1:] if thread.name.startswith("rows") else left
            return start(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    run(edges, layer, inputs(9))
    assert not any(edge.turn.locked() for edge in edges._edges)
    assert sum(edges.rows.values()) == 9
