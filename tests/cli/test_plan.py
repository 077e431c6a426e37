"""`slip plan` and `slip sensitivity` as commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from processes import slip

pytestmark = pytest.mark.slow


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("slip: ") and all(word in done.stderr for word in words), done.stderr


def test_plans_side_by_side(tiny: Path) -> None:
    done = slip("plan", tiny / "config.json", "--rtt", "20ms", "--plans", "all,blocks:0,trusted:1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["blocks"] == 2 and [p["plan"] for p in found["plans"]] == ["all", "blocks:0", "trusted:1"]
    assert [p["round_trips"] for p in found["plans"]] == [9, 5, 1]
    done = slip("plan", tiny)
    assert done.returncode == 0 and "round trips a token" in done.stdout and "--probe" in done.stderr


def test_a_probe_gives_speeds_that_can_be_given(tiny: Path, tmp_path: Path) -> None:
    done = slip("plan", tiny, "--probe", "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (tmp_path / "speeds.json").write_text(json.dumps(found["speeds"]))
    again = slip("plan", tiny, "--device-speed", tmp_path / "speeds.json", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["plans"] == found["plans"]


def test_sensitivity(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.html"
    done = slip("sensitivity", tiny, "--ranks", "2,4", "--tokens", 256, "--report", report, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["blocks"]) == 2 and set(found["blocks"][0]["all"]) == {"2", "4"}
    assert "<svg" in report.read_text()
    done = slip("sensitivity", tiny, "--ranks", "4", "--tokens", 256)
    assert done.returncode == 0 and "most sensitive layer" in done.stdout


def test_bad_input_gives_one_sentence(tiny: Path, tmp_path: Path) -> None:
    refused(slip("plan", tmp_path / "nothing"), "is not a model")
    refused(slip("plan", tiny, "--plans", "first:3"), "first:3", "this model has 2")
    refused(slip("plan", tiny, "--plans", "auto:9rt"), "is no plan")
    refused(slip("plan", tiny, "--rtt", "20"), "is no duration")
    refused(slip("plan", tiny, "--bandwidth", "fast"), "is no bandwidth")
    refused(slip("plan", tiny, "--rank", "0"), "rank")
    refused(slip("plan", tiny, "--device-speed", tmp_path / "nothing"), "cannot read")
    refused(slip("plan", tiny, "--probe", "--device-speed", tmp_path), "leave one of them out")
    refused(slip("sensitivity", tiny, "--ranks", "0"), "list of numbers")
    refused(slip("sensitivity", tmp_path / "nothing"), "is not a model")
