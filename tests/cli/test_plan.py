"""`slip plan` and `slip sensitivity` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import slip
from typer.testing import CliRunner

from sliplm.cli import app
from sliplm.errors import SlipError

pytestmark = pytest.mark.slow


def refused(*arguments: object) -> str:
    """What a command says that is given something wrong."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 1 and isinstance(done.exception, SlipError), done.exception
    return str(done.exception)


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


def test_a_split_within_a_budget(tiny: Path, tmp_path: Path) -> None:
    done = slip("split", tiny, "-o", tmp_path / "out", "--plan", "auto:5rt", "--rank", 4, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = slip("inspect", tmp_path / "out" / "trusted", "--json")
    places = [group["place"] for group in json.loads(shown.stdout)["groups"]]
    assert set(places) == {"masked", "open", "trusted"} and "is open" in done.stdout
    assert "auto:1rt leaves no block masked" in refused("split", tiny, "-o", tmp_path / "no", "--plan", "auto:1rt")
    adapter = ("--plan", "auto:5rt", "--adapter", tmp_path)
    assert "merge the adapter first" in refused("split", tiny, "-o", tmp_path / "no", *adapter)
    assert not (tmp_path / "no").exists()


def test_bad_input_gives_one_sentence(tiny: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert "is not a model" in refused("plan", nothing)
    assert "this model has 2" in refused("plan", tiny, "--plans", "first:3")
    assert "is no plan" in refused("plan", tiny, "--plans", "auto:9rt")
    assert "is no duration" in refused("plan", tiny, "--rtt", "20")
    assert "is no bandwidth" in refused("plan", tiny, "--bandwidth", "fast")
    assert "rank" in refused("plan", tiny, "--rank", "0")
    assert "cannot read" in refused("plan", tiny, "--device-speed", nothing)
    assert "leave one of them out" in refused("plan", tiny, "--probe", "--device-speed", nothing)
    assert "list of numbers" in refused("sensitivity", tiny, "--ranks", "0")
    assert "is not a model" in refused("sensitivity", nothing)
    done = slip("plan", nothing)
    assert done.returncode == 1 and done.stderr.startswith("slip: ") and "Traceback" not in done.stderr
