"""Real processes: pads of two helpers each, in a stock that lies on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import ask, eventually, start_edge

from sliplm import top
from sliplm.registry import authority

pytestmark = pytest.mark.slow


def test_pads_of_two_helpers_from_a_stock_on_disk(run: Any, tiny_split: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_split / "edge", tmp_path / "away" / "edge")
    shutil.copytree(tiny_split / "trusted", tmp_path / "trusted")
    (tmp_path / "spill").mkdir()
    listen = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    kept = ("--pads", "helpers:2", "--stock", "400", "--pads-spill", tmp_path / "spill")
    trusted = run("trusted", tmp_path / "trusted", *listen, *kept)
    ready = trusted.ready()

    def enrol(name: str, **roles: bool) -> Path:
        identity = tmp_path / f"{name}.identity"
        authority.add_device(tmp_path / "trusted" / "authority", name, identity, **roles)
        return identity

    for name in ("one", "other"):
        identity = enrol(name, edge=False, helper=True)
        run("helper", tmp_path / "away" / "edge", "--trusted", ready["listening"], "--identity", identity).ready()

    def look() -> dict[str, Any]:
        url = top.address(ready["metrics"])
        return top.row(url, top.fetch(url))

    def full() -> None:
        seen = look()
        assert seen["pads_ready"] > 380 and seen["pads_stored"] > 300 and seen["pads_stored_bytes"] > 0
        assert (seen["helpers_connected"], seen["helper_lies"], seen["pads_refused"]) == (2, 0, 0)

    eventually(full)
    assert not list((tmp_path / "spill").iterdir())
    api = start_edge(run, tmp_path / "away", ready["listening"], enrol("laptop")).ready()["api"]
    answer = ask(api, "The capital of", max_tokens=100)
    assert answer and ask(api, "The capital of", max_tokens=100) == answer
    assert trusted.stop() == 0 and "Traceback" not in trusted.log
