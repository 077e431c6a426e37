"""`slip demo` on a tiny model: its processes, and what it says of a plan and of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import slip
from typer.testing import CliRunner

from sliplm.cli import app
from sliplm.errors import SlipError

pytestmark = pytest.mark.slow


def shown(tiny: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The result, and what people see."""
    done = slip("demo", "--model", tiny, "--max-tokens", "12", "--json", *options, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), " ".join(done.stderr.split())


def test_a_plan_without_masked_groups_takes_no_helper(tiny: Path) -> None:
    result, said = shown(tiny, "--plan", "trusted:1", "--rtt", "4ms")
    assert list(result["sides"]) == ["trusted", "edge"] and result["groups"] == 0
    assert "no layer is masked" in said and "no one-time pads are needed, and no helper" in said
    assert "a proxy that delays every byte: 4 ms there and back" in said
    assert result["same_answer"] and result["answer"].strip() and "the answer is the original's" in said
    tokens = result["completion_tokens"]
    assert 0 < result["round_trips"] <= tokens + 1  # the end of a text is a token, too
    whole = result["all_predicted"]
    assert whole["round_trips_per_token"] == 9 and whole["seconds"] > tokens * 9 * 4e-3
    assert "predicted for two cores" in said and "trusted:1, measured" in said and "all, as slip plan predicts" in said
    assert result["gives_away"].startswith("block 1 is open: the edge has these weights in plain")
    assert f"given away: {result['gives_away']}" in said
    assert "open blocks and the architecture in plain" in said and result["stolen_ppl"] > 1


def test_masked_groups_take_one(tiny: Path) -> None:
    result, said = shown(tiny, "--plan", "first:1")
    assert set(result["sides"]) == {"trusted", "edge", "helper"} and result["groups"] == 4
    assert "7 layers in 4 groups masked (rank 16" in said and "three processes" in said
    assert "proxy" not in said and "all_predicted" not in result and "predicts" not in said
    assert 5 <= result["round_trips"] <= 5 * (result["completion_tokens"] + 1)
    assert "block 1 is open" in result["gives_away"]


def test_a_budget_is_a_plan(tiny: Path) -> None:
    result, said = shown(tiny, "--plan", "auto:5rt")
    assert result["plan"] == "auto:5rt" and result["groups"] == 4 and "is open" in said


def test_without_options_it_is_as_ever(tiny: Path) -> None:
    result, said = shown(tiny)
    assert set(result["sides"]) == {"trusted", "edge", "helper"} and result["gives_away"] is None
    assert "rank 16, two planes, camouflage and blinding on 15 layers in 9 groups" in said
    assert "embeddings, norms, scales and blinding secrets, none of which the edge has)" in said
    assert "6." not in said and "same_answer" not in result


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rtt", "20"], "is no duration"),
        (["--plan", "middle:1"], "is no plan"),
        (["--plan", "first:3"], "names 3 blocks, and this model has 2"),
        (["--plan", "trusted:2"], "the edge nothing to do"),
        (["--plan", "auto:1rt"], "leaves no block masked"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], says: str, tiny: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--model", str(tiny), *options])
    assert done.exit_code == 1 and isinstance(done.exception, SlipError) and says in str(done.exception)
