"""The split's plan: made, changed, stored, read again, and shown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from loading import attached

from sliplm.errors import BundleError
from sliplm.split.inspect import inspect, summarise, summarise_kept
from sliplm.split.model import split_model
from sliplm.split.plan import GroupPlan, Options, check_plan, read_plan, to_settings

names = st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, max_size=6, unique=True)


@given(names, st.integers(1, 99), st.integers(1, 2), st.sampled_from(["stack", "sum"]))
def test_a_plan_survives_its_file(members: list[str], rank: int, planes: int, kind: Any) -> None:
    plan = [GroupPlan((name,), kind, rank + i, planes) for i, name in enumerate(members)]
    assert read_plan(json.loads(json.dumps({"plan": to_settings(plan)}))) == plan


def test_earlier_formats_had_one_rank_for_all() -> None:
    old = {"groups": [["q", "k"], ["o", "down"]], "sums": [1], "rank": 7, "planes": 1}
    assert read_plan(old) == [GroupPlan(("q", "k"), "stack", 7, 1), GroupPlan(("o", "down"), "sum", 7, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"place": "nowhere"},
        {"kind": "heap"},
        {"rank": 0},
        {"rank": "many"},
        {"planes": 3},
        {"members": []},
        {"members": ["a", "a"]},
        {"members": "a"},
        {"more": 1},
    ],
)
def test_a_damaged_plan_is_refused_in_a_sentence(change: dict[str, Any]) -> None:
    good = {"members": ["a", "b"], "kind": "stack", "rank": 4, "planes": 2, "place": "masked"}
    assert read_plan({"plan": [good]})
    with pytest.raises(BundleError, match="plan"):
        read_plan({"plan": [good | change]})
    for nothing in ({}, None, {"plan": None}, {"groups": 3, "rank": 1, "planes": 1}):
        with pytest.raises(BundleError, match="plan"):
            read_plan(nothing)
    with pytest.raises(BundleError, match="twice"):
        check_plan([GroupPlan(("a",), "stack", 1, 1), GroupPlan(("a",), "stack", 1, 1)])


def mixed(plan: list[GroupPlan]) -> list[GroupPlan]:
    """Every group another rank, every other group one plane."""
    return [msgspec.structs.replace(of, rank=2 + i, planes=1 + i % 2) for i, of in enumerate(plan)]


@pytest.fixture(scope="module")
def mixed_split(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    split_model(str(tiny), out, Options(4), adjust=mixed)
    return out


def test_rank_and_planes_may_differ_by_group(mixed_split: Path, tiny: Path) -> None:
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(mixed_split / "trusted"))
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = original(ids).logits, model(ids).logits
    assert (want - got).square().mean().sqrt() < 0.05 * want.std()  # one plane's errors are among them
    groups = inspect(mixed_split)["groups"]
    assert [g["rank"] for g in groups] == list(range(2, 11)) and [g["planes"] for g in groups[:3]] == [1, 2, 1]
    rows = {op.number: op.scales.shape for op in model.slip.operators}
    assert all(
        rows[g["number"]][0] == g["planes"] and g["edge"]["shape"][0] == g["planes"] * rows[g["number"]][1]
        for g in groups
    )


def test_a_second_split_follows_the_firsts_plan(mixed_split: Path, tiny: Path, tmp_path: Path) -> None:
    again = Options(4, again=mixed_split / "trusted")
    split_model(str(tiny), tmp_path / "again", again, adjust=mixed)
    with pytest.raises(BundleError, match="--rank 2, 3, 4, 5, 6, 7, 8, 9, 10"):
        split_model(str(tiny), tmp_path / "other", again)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("adjust", "said"),
    [
        (lambda plan: plan[1:], "other groups"),
        (lambda plan: [], "no groups"),
        (lambda plan: [msgspec.structs.replace(plan[0], rank=20), *plan[1:]], "nothing would be left for the edge"),
        (lambda plan: [msgspec.structs.replace(plan[0], kind="sum"), *plan[1:]], "other groups"),
        (lambda plan: [msgspec.structs.replace(plan[0], rank=0), *plan[1:]], "rank 0"),
        (lambda plan: [msgspec.structs.replace(plan[0], planes=4), *plan[1:]], "4 planes"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(adjust: Any, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=said):
        split_model(str(tiny), tmp_path / "out", Options(4), adjust=adjust)
    assert not (tmp_path / "out").exists()


def test_inspect_tells_what_is_where(tiny_split: Path) -> None:
    found = inspect(tiny_split)
    assert found["blinding"] and found["camouflage"] and not found["based"] and found["model"] == "model"
    assert found["architecture"] == "LlamaForCausalLM" and len(found["groups"]) == 9
    qkv = found["groups"][0]
    assert qkv["members"] == [f"model.layers.0.self_attn.{m}_proj" for m in "qkv"]
    assert (qkv["kind"], qkv["rank"], qkv["planes"], qkv["place"]) == ("stack", 4, 2, "masked")
    assert qkv["edge"] == {"shape": [200, 60], "bytes": 12000}
    held = sum(g["trusted"]["bytes"] for g in found["groups"]) + sum(found["kept"].values())
    assert 0 <= found["trusted_bytes"] - held < 100_000  # headers, the tokenizer, and the like
    assert "model.embed_tokens.weight" in found["kept"] and not any("proj" in name for name in found["kept"])
    assert sum(g["edge"]["bytes"] for g in found["groups"]) < found["edge_bytes"]
    rows = summarise(found["groups"])
    assert (rows[0]["count"], rows[0]["shape"]) == (2, (200, 60)) and sum(r["count"] for r in rows) == 9
    assert summarise_kept({"a.0.b": 1, "a.1.b": 2, "c": 9}) == [("c", 1, 9), ("a.*.b", 2, 3)]


def test_inspect_of_one_half(tiny_split: Path, tmp_path: Path) -> None:
    whole, edge, trusted = (inspect(path) for path in (tiny_split, tiny_split / "edge", tiny_split / "trusted"))
    assert edge["split"] == trusted["split"] == whole["split"]
    assert [g["edge"] for g in edge["groups"]] == [g["edge"] for g in whole["groups"]]
    assert "members" not in edge["groups"][0] and "trusted_bytes" not in edge
    assert "edge" not in trusted["groups"][0] and trusted["kept"] == whole["kept"]
    shutil.copytree(tiny_split / "edge", tmp_path / "edge")
    assert inspect(tmp_path) == edge


@pytest.mark.slow
def test_the_command(tiny_split: Path, mixed_split: Path, tmp_path: Path) -> None:
    def slip(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sliplm.cli", "inspect", *map(str, arguments)], capture_output=True, text=True
        )

    assert json.loads(slip(tiny_split, "--json").stdout) == inspect(tiny_split)
    shown = slip(mixed_split)
    assert shown.returncode == 0 and "LlamaForCausalLM" in shown.stdout and "lm_head" in shown.stdout
    assert "q_proj" not in slip(tiny_split / "edge").stdout
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "edge").symlink_to(mixed_split / "edge")
    (tmp_path / "mixed" / "trusted").symlink_to(tiny_split / "trusted")
    for wrong, said in ((tmp_path, "no bundle"), (tmp_path / "mixed", "two different splits")):
        done = slip(wrong)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("file", ["manifest.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("what", [b"", b"{}", b"[]", b"\xff" * 40, b'\x08\0\0\0\0\0\0\0{"a":1}'])
def test_inspect_of_damage_is_one_sentence(file: str, what: bytes, tiny_split: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_split / "trusted", tmp_path / "trusted")
    (tmp_path / "trusted" / file).write_bytes(what)
    with pytest.raises(BundleError):
        inspect(tmp_path)
