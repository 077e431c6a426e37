"""Many requests at once, on edges and helpers that die meanwhile: not one is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from loading import attached
from many import PROMPTS, TOKENS, Machines, ask_all, asked_by

from sliplm.edge.side import Edge
from sliplm.engine.builtin import BuiltinEngine
from sliplm.protocol.messages import GenerateRequest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_edge_and_then_a_helper_are_lost_and_no_request_is(
    run: Any, bundle: Path, tiny_split: Path, tmp_path: Path, how: signal.Signals
) -> None:
    engine = attached(BuiltinEngine(tiny_split / "trusted"))
    link = engine.model.slip.default_link
    requests = {p: GenerateRequest(prompt=p, max_tokens=TOKENS, temperature=0) for p in PROMPTS}
    expected = {p: "".join(chunk.text for chunk in engine.generate(r, link)) for p, r in requests.items()}
    trusted = run(
        "trusted", bundle / "trusted", "--pads", "helpers", "--stock", "32", "--concurrent", "0",
        "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0",
    )  # fmt: skip
    ready = trusted.ready()
    machines = Machines(run, bundle, ready["listening"], how)
    ask = asked_by(Edge(bundle / "edge", ready["listening"], tmp_path / "one.identity"))
    losses = [machines.lose_one(machines.edges), machines.lose_one(machines.helpers)]
    assert ask_all(ask, losses) == expected
    metrics = httpx.get(f"{ready['metrics']}/metrics", trust_env=False).text.splitlines()
    values = dict(line.removeprefix("slip_trusted_").rsplit(" ", 1) for line in metrics if line[0] != "#")
    outcomes = {name: float(value) for name, value in values.items() if name.startswith("requests_total{")}
    assert outcomes['requests_total{outcome="length"}'] + outcomes['requests_total{outcome="stop"}'] == len(PROMPTS)
    assert sum(outcomes.values()) == len(PROMPTS)
    assert trusted.stop() == 0
    assert "Traceback" not in trusted.log
