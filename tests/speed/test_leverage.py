"""`slip bench --streams`: leverage is what its parts say, and who is measured has a core to itself. No test asserts a
time."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from processes import slip
from rich.console import Console

from sliplm.errors import SlipError
from sliplm.planner.costs import Network
from sliplm.speed import cores, drafts, models, runner, show

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="binds processes to cores")
SHORT = ("--tokens", 8, "--rounds", 1)


@linux
def test_leverage_is_measured_and_is_what_its_parts_say(tmp_path: Path) -> None:
    done = slip("bench", "llama-tiny", "--streams", "3,1,3", *SHORT, "--keep", tmp_path, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["model"], result["block"], result["planes"]) == ("llama-tiny", False, 1)
    assert [row["streams"] for row in result["streams"]] == [1, 3]
    for row in result["streams"]:
        parts = [row[name] for name in ("trusted_cpu_ms", "pads_cpu_ms", "bf16_cpu_ms", "fp32_cpu_ms")]
        assert min(parts) > 0 and row["pads"] == "helpers"
        assert row["unprotected_cpu_ms"] == min(parts[2:])  # an owner would take the faster one
        assert row["leverage"] == pytest.approx(row["unprotected_cpu_ms"] / (parts[0] + parts[1]))
    trusted = result["trusted"]
    parameters = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64 + 2 * 64) + 64 + 2 * 512 * 64
    assert trusted["bf16"] == 2 * parameters
    files = (tmp_path / "llama-tiny-planes1-rank16" / "trusted").iterdir()
    assert trusted["bundle"] == sum(f.stat().st_size for f in files if f.is_file())
    assert 0 < trusted["anonymous"] < trusted["resident"] <= trusted["peak"] and trusted["load_seconds"] > 0


@pytest.mark.parametrize("said", ["0", "x", "", "1,,8"])
def test_streams_that_are_no_numbers(said: str) -> None:
    done = slip("bench", "llama-tiny", f"--streams={said}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == f"slip: --streams {said!a} is not a list of numbers from 1 on, such as 1,8,16.\n"


@pytest.mark.parametrize("option", [("--peers",), ("--long", 100), ("--plot", "x.svg")])
def test_leverage_is_measured_alone(option: tuple[object, ...]) -> None:
    done = slip("bench", "llama-tiny", "--streams", 1, *option)
    assert done.returncode == 1 and done.stderr.startswith("slip: --streams measures leverage alone")


def test_prompts_differ_in_length_and_are_filled_up_on_the_left() -> None:
    ids, mask = runner.prompts(1)
    assert ids.tolist() == [list(range(3, 11))] and mask.all()
    ids, mask = runner.prompts(11)
    assert ids.shape == mask.shape == (11, 2 * runner.PROMPT - 1) and ids.max() < 256
    assert mask.sum(1).tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10]
    assert (mask.diff(dim=1) >= 0).all() and mask[:, -1].all()
    assert len({tuple(row) for row in ids.tolist()}) == 11


def test_stock_counts_as_many_pads_of_every_group_as_it_divides_by(
    tiny_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as running:
        trusted = runner.Protected(tiny_split, running)
        trusted.decode(4, 2)  # leaves more pads of the head, which sees a prompt's last token only, than of the rest
        source, made = trusted.model.slip.pool.own, Counter[int]()
        image = source.image

        def counted(group: int, key: bytes, count: int, threads: int) -> np.ndarray:
            made[group] += count
            return image(group, key, count, threads)

        clock: list[Counter[int]] = []
        monkeypatch.setattr(source, "image", counted)
        monkeypatch.setattr(runner.time, "process_time", lambda: clock.append(made.copy()) or 6.0 * len(clock))
        assert trusted.stock(5, 3) == {"cpu": 6.0 / 15}
        monkeypatch.undo()
        begin, end = clock
        assert {end[group] - begin[group] for group in range(9)} == {15}
        assert len(set(begin.values())) == 2  # so the first half had something to even out


@linux
def test_what_starts_elsewhere_begins_there_and_this_thread_comes_back() -> None:
    before = os.sched_getaffinity(0)
    core, others = cores.apart()
    assert len(core) == 1 and set(core) | set(others) == before
    assert len(before) == 1 or not set(core) & set(others)
    with pytest.raises(KeyError), cores.on(core):
        assert os.sched_getaffinity(0) == set(core)
        raise KeyError
    assert os.sched_getaffinity(0) == before
    with cores.on([]):
        assert os.sched_getaffinity(0) == before


def test_a_system_without_affinity_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(SlipError, match="Linux"):
        cores.apart()


def test_blocks_are_blocks_and_say_so() -> None:
    assert {"llama-7b-block", "llama-70b-block"} == models.BLOCKS
    for name in models.BLOCKS:
        config = transformers.LlamaConfig(**models.SHAPES[name], tie_word_embeddings=False)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        all_of_it = sum(p.numel() for p in model.parameters())
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        assert 0 < 1 - block / all_of_it < 0.011
    row = dict.fromkeys(("trusted_cpu_ms", "pads_cpu_ms", "bf16_cpu_ms", "fp32_cpu_ms", "leverage"), 1.0)
    trusted = dict.fromkeys(("resident", "anonymous", "peak", "bundle", "load_seconds", "bf16"), 1.0)
    result = {"model": "llama-7b-block", "block": True, "planes": 1, "rank": 16, "trusted": trusted}
    result["streams"] = [{"streams": 8, "pads": "self", **row}]
    console = Console(record=True, file=StringIO(), width=120)
    show.tables({"kernels": "some", "threads": 1, "results": [result]}, console)
    assert "llama-7b-block (one decoder block), planes 1, rank 16" in console.export_text()


@pytest.mark.parametrize("options", [["--drafts", "--streams", "1"], ["--drafts", "--peers"], ["--rtt", "5ms"]])
def test_guesses_are_measured_alone(options: list[str]) -> None:
    done = slip("bench", "smollm2", *options)
    assert done.returncode == 1 and done.stderr.startswith("slip: --") and "--drafts" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_guesses_are_worth_is_measured(tiny_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "ASKED", {"again": "a b a b a b", "else": "Hello"})
    rows = drafts.measure(tiny_split, 12, 1, Network(), lambda _: None)
    assert [row["text"] for row in rows] == ["again", "else"]
    for row in rows:
        assert row["same"] and row["tokens_per_pass"] >= 1 and min(row["ms_with"], row["ms_without"]) > 0
    out = StringIO()
    show.tables(
        {"kernels": "", "threads": 1, "results": [
            {"model": "tiny", "block": False, "planes": 1, "rank": 4, "drafts": rows}]},
        Console(file=out, width=160),
    )  # fmt: skip
    assert out.getvalue().count("the same") == 2
