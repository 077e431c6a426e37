"""Edges that answer, lie, die or stall as they are told, and a pool of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from layers import COLUMNS, ROWS, Layer

from sliplm.errors import LinkError
from sliplm.exchange import edges as module
from sliplm.exchange import shares
from sliplm.exchange.edges import Edges
from sliplm.exchange.link import Field, Link, Own
from sliplm.exchange.step import exchange
from sliplm.pads.pool import Pool


class Fake(Link):
    """An edge that answers after `delay` seconds, and has the `fault` at its question number `at`, for good."""

    def __init__(
        self, layer: Layer, fault: str = "", at: int = 0, delay: float = 0.0, party: str | None = None
    ) -> None:
        self.layer, self.fault, self.at, self.delay, self.party = layer, fault, at, delay, party
        self.seen: list[np.ndarray] = []
        self.lies = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return not self._closed.is_set()

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        if not self.alive:
            raise LinkError("the connection to the edge is closed")
        assert self._lock.acquire(blocking=False), "two exchanges at once"
        try:
            fault = self.fault if len(self.seen) >= self.at else ""
            if fault == "die":
                self._fail()
            self.seen.append(x.copy())
            mine = own()
            if fault == "die late":
                self._fail()
            if fault == "stall":
                self._closed.wait(2)
                self._fail()
            time.sleep(self.delay)
            y = self.layer.matrices[group].product(x)
            y[-1, -1] ^= np.uint32(fault == "lie")
            return y, mine
        finally:
            self._lock.release()

    def _fail(self) -> None:
        self.close()
        raise LinkError("the connection to the edge was lost")

    def lied(self) -> None:
        self.lies += 1

    def close(self) -> None:
        self._closed.set()


def quickened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Edges stall sooner, until the fixture that this is made of ends; then pools are closed."""
    monkeypatch.setattr("sliplm.exchange.edge.STALL_SECONDS", 0.4)
    monkeypatch.setattr("sliplm.exchange.edge.STALL_NEW_SECONDS", 0.4)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    yield
    for edges in STARTED:
        edges.close()
    STARTED.clear()


STARTED: list[Edges] = []


def pool_of_edges(*links: Fake, patience: float = 0.1) -> Edges:
    edges = Edges(patience)
    STARTED.append(edges)
    for i, link in enumerate(links):
        edges.add(link, f"edge{i}", link.lied)
    return edges


def know(edges: Edges, *each: float) -> None:
    """As if it were known that a row takes so many seconds."""
    for edge, seconds in zip(edges._edges, each, strict=True):
        edge.speed.count = shares.NEW
        edge.speed.latency, edge.speed.reading = 0.0, 0.0
        edge.speed.each = seconds * shares.ROWS * shares.SIZE / (2 * ROWS * COLUMNS)
        edge.begun = time.perf_counter()


def run(edges: Edges, layer: Layer, x: np.ndarray, pads: Pool | None = None, step: Any = exchange) -> np.ndarray:
    return edges.run(step, layer.op, x, pads or layer.pads, layer.own)


def all_seen(*links: Fake) -> list[bytes]:
    return [row.tobytes() for link in links for x in link.seen for row in x]
