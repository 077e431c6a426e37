"""How many Python calls an activation's way to the edge and back takes, on either side: they cost more than the
arithmetic of one token does."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from link_fakes import DIGEST, SHAPES, Pair
from loading import pool_of

from sliplm import kernels
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.exchange import check
from sliplm.exchange.edges import Edges
from sliplm.exchange.link import Link
from sliplm.exchange.operator import Operator
from sliplm.split.blinding import Blinding
from sliplm.trusted.group import MemberWeights, ProtectedGroup
from sliplm.trusted.runtime import Runtime

TRUSTED, EDGE = 24, 12
"""With the native core, which opens, seals and moves all records of a payload in one call."""
EXCHANGES = 10


def edges_of(link: Link) -> Edges:
    edges = Edges()
    edges.add(link, "edge")
    return edges


class Counts:
    """Calls of Python functions, by name, while it is a thread's profiler."""

    def __init__(self) -> None:
        self.calls = Counter[str]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.calls[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    def per_exchange(self) -> dict[str, int]:
        return {name: count // EXCHANGES for name, count in self.calls.items() if count >= EXCHANGES}


@pytest.mark.parametrize("pooled", [False, True])
def test_an_exchange_takes_few_calls(home: Path, identity: Path, pooled: bool) -> None:
    rng = np.random.default_rng(0)
    q = [rng.integers(-127, 128, shape).astype(np.int8) for shape in SHAPES]
    matrices = [kernels.prepare(m) for m in q]
    (rows, columns), scales = SHAPES[0], np.ones((1, SHAPES[0][0]), np.float32)
    bases = Blinding.random(columns), Blinding.random(rows)
    op = Operator(
        0, SHAPES[0], float(np.linalg.norm(q[0].astype(float), axis=1).max()), scales, *bases, *check.secrets(q[0])
    )
    runtime = Runtime([op], DIGEST)
    runtime.pool.own = pool_of(matrices).own
    runtime.pool.resize(3 * EXCHANGES)
    runtime.pool.start()
    runtime.pool.wait(3 * EXCHANGES)
    group = ProtectedGroup(op, [MemberWeights("a", torch.ones(rows, 2), torch.ones(2, columns), None)], runtime)
    worker = EdgeWorker(Multiplier(matrices, DIGEST), ("localhost", 1), identity)
    x = rng.normal(size=(1, columns)).astype(np.float32)
    trusted, edge = Counts(), Counts()

    def serve() -> None:
        sys.setprofile(edge)
        worker._serve(pair.edge)

    with Pair(home, identity) as pair, runtime.using(edges_of(pair.link) if pooled else pair.link):
        working = threading.Thread(target=serve)
        working.start()
        group.stacked(x)  # the first one makes room for frames
        edge.calls.clear()
        sys.setprofile(trusted)
        for _ in range(EXCHANGES):
            group.stacked(x)
        sys.setprofile(None)
        ours, theirs = trusted.per_exchange(), edge.per_exchange()
        pair.link.close()
        working.join(10)
    runtime.pool.close()
    assert 5 < sum(ours.values()) <= TRUSTED + 3 * pooled, ours
    assert 2 < sum(theirs.values()) <= EDGE, theirs
