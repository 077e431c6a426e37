"""Pads and the pool of edges: who may use whose, and that late ones are no fault of an edge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from edges_fakes import Fake, know, pool_of_edges, quickened, run
from layers import COLUMNS, Layer, inputs

from sliplm.errors import BusyError
from sliplm.pads.pool import Pool
from sliplm.prg import expand


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from quickened(monkeypatch)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


class Maker:
    def __init__(self, party: str) -> None:
        self.name, self.parties = party, frozenset({party})

    def reject(self) -> None:
        raise AssertionError


def test_pads_of_a_party_go_to_edges_of_others_without_waiting(layer: Layer) -> None:
    pads = Pool([layer.op.shape], depth=64, batch=16, patience=30)
    pads.expected = 1
    maker = Maker("red")
    pads.hire(maker)
    while job := pads.job(maker, 0):
        pads.deliver(job, layer.matrices[0].product(expand(job.key, 0, job.count, COLUMNS)))
    red, blue = Fake(layer, party="red"), Fake(layer, party="blue")
    edges = pool_of_edges(red, blue)
    know(edges, 1e-4, 1e-3)  # the red one would be faster
    for rows in (1, 8, 1):
        x = inputs(rows)
        assert np.allclose(run(edges, layer, x, pads), layer.wanted(x), rtol=0, atol=2e-4)
    assert not red.seen and len(blue.seen) == 3 and pads.refused == 0
    assert pads.ready(0, "blue") and not pads.ready(0, "red")


def test_pads_that_come_late_are_no_stall_of_the_edge(layer: Layer) -> None:
    links = [Fake(layer), Fake(layer)]
    edges = pool_of_edges(*links)
    take = layer.pads.take

    class Late:
        ready = layer.pads.ready

        def take(self, *arguments: Any) -> Any:
            time.sleep(0.5)
            return take(*arguments)

    run(edges, layer, inputs(1), Late())  # type: ignore[arg-type]
    assert all(link.alive for link in links)


def test_if_helpers_are_too_slow_it_says_so(layer: Layer) -> None:
    pads = Pool([layer.op.shape], patience=0.05)
    pads.expected = 1
    edges = pool_of_edges(Fake(layer, party="a"), Fake(layer, party="b"))
    with pytest.raises(BusyError):
        run(edges, layer, inputs(1), pads)
