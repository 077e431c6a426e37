"""Many requests at once, on edges and helpers that die meanwhile: not one is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from many import Machines, ask_all, asked_by, right_texts
from processes import eventually

from sliplm.edge.side import Edge

pytestmark = pytest.mark.slow

REQUESTS_TOTAL = "slip_trusted_requests_total{"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_edge_and_then_a_helper_are_lost_and_no_request_is(
    run: Any, bundle: Path, tiny_split: Path, tmp_path: Path, how: signal.Signals
) -> None:
    expected = right_texts(tiny_split)
    trusted = run(
        "trusted", bundle / "trusted", "--pads", "helpers", "--stock", "32", "--concurrent", "0",
        "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0",
    )  # fmt: skip
    ready = trusted.ready()
    machines = Machines(run, bundle, ready["listening"], how)
    ask = asked_by(Edge(bundle / "edge", ready["listening"], tmp_path / "one.identity"))
    losses = [machines.lose_one(machines.edges), machines.lose_one(machines.helpers)]
    assert ask_all(ask, expected, losses) == expected

    def all_are_counted() -> None:
        lines = httpx.get(f"{ready['metrics']}/metrics", trust_env=False).text.splitlines()
        counts = [line.split('outcome="')[1].split('"} ') for line in lines if line.startswith(REQUESTS_TOTAL)]
        ended = {outcome: float(count) for outcome, count in counts}
        assert ended["length"] + ended["stop"] == sum(ended.values()) == len(expected)

    eventually(all_are_counted)  # a moment after their last pieces
    assert trusted.stop() == 0
    assert "Traceback" not in trusted.log
