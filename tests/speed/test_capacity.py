"""Capacity is what its parts say: by hand for shapes whose sums are easy."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench import capacity
from sliplm.errors import SlipError
from sliplm.planner.speeds import Edge, Plain, Speeds, Trusted
from sliplm.protocol.frames import HEADER

SPEEDS = Speeds(
    Trusted(step=1, exchange=1, encode=1, decode=1, tls=1, read=1, multiply_adds=1, plain=Plain(1, 1, 1, 1, 1)),
    Edge(tls=2**-20, read=2**30, multiply_adds=2**36, plain=Plain(1, 1, 1, 1, 1)),
)


def result(model: str, streams: int, planes: int = 1) -> dict[str, Any]:
    row = {"streams": streams, "pads": "helpers", "trusted_cpu_ms": 12.5, "pads_cpu_ms": 7.5}
    return {"model": model, "planes": planes, "rank": 16, "block": "block" in model, "streams": [row]}


def of(model: str, streams: int, planes: int = 1, reads: float = 4.0, users: float = 50.0) -> capacity.Capacity:
    measured = result(model, streams, planes)
    return capacity.capacity(measured, measured["streams"][0], reads, users, SPEEDS)


GROUPS = {  # rows and columns: q k v, o, gate and up, down; so many blocks; the head
    "llama-1.1b": (((2048 + 2 * 256, 2048), (2048, 2048), (2 * 5632, 2048), (2048, 5632)), 22, (32000, 2048)),
    "llama-7b-block": (((3 * 4096, 4096), (4096, 4096), (2 * 11008, 4096), (4096, 11008)), 32, (32000, 4096)),
    "llama-70b-block": (((8192 + 2048, 8192), (8192, 8192), (2 * 28672, 8192), (8192, 28672)), 80, (32000, 8192)),
}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("streams", [1, 16])
@pytest.mark.parametrize("model", list(GROUPS))
def test_by_hand(model: str, streams: int, planes: int) -> None:
    block, count, head = GROUPS[model]
    groups = [*block] * count + [head]
    found = of(model, streams, planes)
    sent = Fraction(sum(4 * k + Fraction(HEADER.size, streams) for _, k in groups))
    received = Fraction(sum(4 * planes * m + Fraction(HEADER.size, streams) for m, _ in groups))
    assert (found.sent, found.received) == (sent, received)
    images = sum(4 * planes * m for m, _ in groups)
    assert found.images == images
    assert (found.edge_bits, found.helper_bits) == (32 * (sent + received), 32 * images)
    down, up = sum(k for _, k in block), planes * sum(m for m, _ in block)
    whole = model == "llama-1.1b"
    on_line = 1 if whole else count + Fraction(head[1] + planes * head[0], down + up)
    of_pads = 1 if whole else count + Fraction(planes * head[0], up)
    assert found.derived is not whole
    assert found.trusted_ms == pytest.approx(float(on_line * Fraction(25, 2)), rel=1e-12)
    assert found.pads_ms == pytest.approx(float(of_pads * Fraction(15, 2)), rel=1e-12)
    tokens = 1000 / (on_line * Fraction(25, 2) + of_pads * Fraction(15, 2))
    assert found.tokens == pytest.approx(float(tokens), rel=1e-12)
    assert found.each == pytest.approx(float(tokens / streams), rel=1e-12)
    assert found.users == pytest.approx(float(tokens / 4), rel=1e-12)
    assert found.cores == pytest.approx(float(200 / tokens), rel=1e-12)
    # Q is read once a batch, or else multiplied row by row; then bytes go through TLS.
    products = [
        max(Fraction(planes * m * k, 2**30), Fraction(streams * planes * m * k, 2**36))
        + Fraction(4 * streams * (planes * m + k), 2**20)
        for m, k in groups
    ]
    assert found.edges == pytest.approx(float(200 * sum(products) / streams), rel=1e-12)
    made = Fraction(planes * sum(m * k for m, k in groups), 2**36) + Fraction(images, 2**20)
    assert found.helpers == pytest.approx(float(200 * made), rel=1e-12)


def test_what_was_measured_again_counts_and_rows_are_in_order(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"results": [result("llama-7b-block", 16), result("llama-1.1b", 16)]}))
    better = result("llama-1.1b", 16)
    better["streams"][0]["trusted_cpu_ms"] = 2.5
    better["streams"].insert(0, {"streams": 1, "trusted_cpu_ms": 30.0, "pads_cpu_ms": 10.0})
    new.write_text(json.dumps({"results": [better, result("smollm2", 16)]}))
    found = capacity.read([old, new])
    assert [(r["model"], row["streams"], row["trusted_cpu_ms"]) for r, row in found] == [
        ("llama-1.1b", 1, 30.0),
        ("llama-1.1b", 16, 2.5),
        ("llama-7b-block", 16, 12.5),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not what `slip bench --streams 1,8,16 --json` prints"),
        ("[]", "is not what"),
        ('{"results": [{"model": "llama-1.1b", "planes": 1, "decode": {}}]}', "is not what"),
        ('{"results": [{"model": "llama-1.1b", "planes": 1, "rank": 16, "streams": [{"streams": 1}]}]}', "is not what"),
        ('{"results": []}', "there is none of llama-1.1b"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(SlipError, match=why):
        capacity.read([tmp_path / "file.json"])


def test_users_are_in_brackets_where_a_core_gives_each_of_them_less() -> None:
    rows = [of("llama-1.1b", 10, reads=5.0, users=100.0), of("llama-7b-block", 16, reads=5.0, users=100.0)]
    *_, enough, less = capacity.table(rows, 5.0, 100.0).splitlines()
    cells = [cell.strip() for cell in enough.split("|")[1:-1]]
    assert cells[:6] == ["1.1B", "10", "12.5 + 7.5", "50.0 (5.0)", "10", "10"]
    assert less.startswith("| 7B, from a block | 16 |") and "| (0.31) |" in less


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(json.dumps({"results": [result("llama-70b-block", 16)]}))
    command = [sys.executable, "-m", "bench.capacity"]
    done = subprocess.run([*command, tmp_path / "file.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("| 70B, from a block | 16 | ")
    done = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("bench.capacity: cannot read ")
