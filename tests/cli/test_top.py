"""`slip top`: what it makes of metrics, and what it prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from edge_api import listening
from rich.console import Console

from sliplm import top
from sliplm.cli.table import HEADINGS, view
from sliplm.edge.api import create_app
from sliplm.edge.connection import WorkCounters
from sliplm.errors import LinkError
from sliplm.protocol.messages import Chunk, GenerateRequest

TRUSTED = """\
# TYPE slip_trusted_requests counter
slip_trusted_requests_total{outcome="stop"} 3.0
slip_trusted_requests_total{outcome="failed"} 1.0
# TYPE slip_trusted_requests_in_progress gauge
slip_trusted_requests_in_progress 2.0
# TYPE slip_trusted_tokens counter
slip_trusted_tokens_total{kind="prompt"} 50.0
slip_trusted_tokens_total{kind="completion"} %d
# TYPE slip_trusted_exchanges counter
slip_trusted_exchanges_total{device="a"} %d
slip_trusted_exchanges_total{device="b"} 0
# TYPE slip_trusted_exchange_seconds counter
slip_trusted_exchange_seconds_total %f
# TYPE slip_trusted_pads_ready gauge
slip_trusted_pads_ready 40.0
# TYPE slip_trusted_verification_failures counter
slip_trusted_verification_failures_total 1.0
# TYPE slip_trusted_edges_connected gauge
slip_trusted_edges_connected 2.0
"""


def sample(monkeypatch: pytest.MonkeyPatch, text: str, when: float) -> top.Sample:
    monkeypatch.setattr(httpx.Client, "get", lambda *_: httpx.Response(200, text=text))
    return top.fetch("http://x/metrics")._replace(when=when)


def test_rates_are_those_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sample(monkeypatch, TRUSTED % (100, 1000, 5.0), 10.0)
    now = sample(monkeypatch, TRUSTED % (120, 3000, 5.5), 12.0)
    row = top.row("u", now, before)
    assert row["side"] == "trusted" and row["connected"] == 2
    assert row["requests"] == 4 and row["requests_in_progress"] == 2 and row["completion_tokens"] == 120
    assert row["tokens_per_second"] == 10 and row["exchanges_per_second"] == 1000
    assert row["exchange_seconds"] == pytest.approx(0.00025)
    assert row["pads_ready"] == 40 and row["pads_target"] is None and row["verification_failures"] == 1
    assert top.row("u", now)["tokens_per_second"] is None
    assert top.row("u", before, now)["tokens_per_second"] == 0  # it was started anew
    assert top.row("u", now, now)["exchange_seconds"] is None


def test_addresses() -> None:
    assert top.address("127.0.0.1:8411") == "http://127.0.0.1:8411/metrics"
    assert top.address("http://h:1/other") == "http://h:1/other"
    assert top.address("http://h:1/v1") == top.address("http://h:1/v1/") == "http://h:1/metrics"  # as edges print it
    for wrong in ("", "ftp://h", "http://", "http://h:x"):
        with pytest.raises(LinkError, match="not an address"):
            top.address(wrong)


@pytest.mark.parametrize("width", [60, 80, 132])
def test_a_narrow_terminal_shows_fewer_columns_and_none_in_two(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    row = top.row("http://127.0.0.1:8411/metrics", sample(monkeypatch, TRUSTED % (100, 1000, 5.0), 10.0))
    away = {"url": "http://[::1]:9/metrics", "error": "http://[::1]:9/metrics needs its key: see --api-key."}
    console = Console(width=width, file=io.StringIO())
    console.print(view([row, away], width))
    heading, first, second, *errors = console.file.getvalue().splitlines()
    assert first.split()[:4] == ["127.0.0.1:8411", "trusted", "2", "edges"] and second.split() == ["[::1]:9", "away"]
    assert "".join(errors).replace("\n", " ") == away["error"]
    shown = [name for name in HEADINGS if name in heading]
    assert len(shown) == {60: 5, 80: 7, 132: 10}[width] and shown == list(HEADINGS[: len(shown)])


HELPED = """\
# TYPE slip_trusted_helpers_connected gauge
slip_trusted_helpers_connected 2.0
# TYPE slip_trusted_helper_images counter
slip_trusted_helper_images_total %d
# TYPE slip_trusted_helper_lies counter
slip_trusted_helper_lies_total 1.0
# TYPE slip_trusted_pads_refused counter
slip_trusted_pads_refused_total 3.0
"""
STORED = """\
# TYPE slip_trusted_pads_stored gauge
slip_trusted_pads_stored 5000
# TYPE slip_trusted_pads_stored_bytes gauge
slip_trusted_pads_stored_bytes 8.5e9
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", None),
        (STORED, "on disk those of 5,000 tokens, 8,500 MB"),
        (HELPED % 0, "2 helpers, 0 pads/s, 1 wrong, 3 times only pads of an edge's own party"),
    ],
)
def test_a_line_says_who_makes_pads(monkeypatch: pytest.MonkeyPatch, more: str, said: str | None) -> None:
    now = sample(monkeypatch, TRUSTED % (100, 1000, 5.0) + more, 10.0)
    row = top.row("http://h:1/metrics", now, now._replace(when=9.0))
    console = Console(width=160, file=io.StringIO())
    console.print(view([row], 160))
    assert console.file.getvalue().splitlines()[2:] == ([] if said is None else [f"h:1: {said}"])


SPREAD = """\
# TYPE slip_trusted_edge_rows counter
slip_trusted_edge_rows_total{kind="laptop"} %d
slip_trusted_edge_rows_total{kind="rack"} %d
slip_trusted_edge_rows_total{kind="gone"} 7
# TYPE slip_trusted_exchanges_replaced counter
slip_trusted_exchanges_replaced_total %d
"""


def test_a_line_says_which_edges_compute_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now, alone = (
        sample(monkeypatch, TRUSTED % (1, 1, 1.0) + SPREAD % counts, when)
        for counts, when in (((0, 50, 0), 10.0), ((600, 250, 2), 12.0), ((900, 250, 0), 13.0))
    )
    row = top.row("http://h:1/metrics", now, before)
    assert row["edge_rows_per_second"] == {"laptop": 300, "rack": 100} and row["exchanges_replaced"] == 2
    console = Console(width=160, file=io.StringIO())
    console.print(view([row, top.row("http://h:1/metrics", alone, now)], 160))
    said = "h:1: laptop 300 rows/s (75%), rack 100 rows/s (25%), 2 times another edge was asked"
    assert console.file.getvalue().splitlines()[3:] == [said]  # of one that computes alone there is nothing to say


GUESSED = """\
# TYPE slip_trusted_drafted_tokens counter
slip_trusted_drafted_tokens_total{outcome="accepted"} %d
slip_trusted_drafted_tokens_total{outcome="rejected"} 9
"""


def test_a_line_says_how_many_tokens_a_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (
        sample(monkeypatch, TRUSTED % (tokens, 1, 1.0) + GUESSED % accepted, when)
        for tokens, accepted, when in ((100, 10, 10.0), (160, 50, 12.0), (170, 50, 14.0))
    )
    guessing, not_guessing = (top.row("http://h:1/metrics", *pair) for pair in ((second, first), (third, second)))
    assert guessing["tokens_per_pass"] == 3 and not_guessing["tokens_per_pass"] == 1
    console = Console(width=160, file=io.StringIO())
    console.print(view([guessing, not_guessing], 160))
    assert console.file.getvalue().splitlines()[3:] == ["h:1: 3.00 tokens a pass"]


def test_helpers_are_as_fast_as_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = (
        sample(monkeypatch, TRUSTED % (1, 1, 1.0) + HELPED % made, when) for made, when in ((100, 10.0), (700, 12.0))
    )
    assert top.row("u", now, before)["helper_pads_per_second"] == 300


def test_an_edge_counts_what_was_asked_of_it_and_not_who_looked(edge: str) -> None:
    for _ in range(3):
        row = top.row(edge, top.fetch(edge + "/metrics"))
    assert row["requests"] == 1 and row["requests_in_progress"] == 0


@pytest.fixture
def edge() -> Iterator[str]:
    work = WorkCounters()
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.01):
            work.exchanges += 10
            work.compute_ns += 10_000_000

    def generate(_: GenerateRequest) -> Iterator[Chunk]:
        yield Chunk("x", "stop", 3, 2)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    with listening(create_app(generate, host="127.0.0.1", work=work)) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
        yield url
    stop.set()
    thread.join()


def slip_top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from sliplm.cli import main; main()", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


@pytest.mark.slow
def test_once(edge: str) -> None:
    done = slip_top(edge, "--once", "--json", "--interval", "0.3")
    assert done.returncode == 0, done.stderr
    row: dict[str, Any]
    (row,) = json.loads(done.stdout)["endpoints"]
    assert row["side"] == "edge" and row["connected"] == 1 and row["completion_tokens"] == 2
    assert row["exchanges_per_second"] > 0 and row["exchange_seconds"] == pytest.approx(0.001)
    shown = slip_top(edge.removeprefix("http://"), "127.0.0.1:1", "--once", "--interval", "0.3")
    assert shown.returncode == 1 and "connected" in shown.stdout and "away" in shown.stdout
    assert "1.00 ms" in shown.stdout and "Traceback" not in shown.stderr


@pytest.mark.slow
def test_what_is_no_edge(edge: str) -> None:
    done = slip_top(edge + "/healthz", "--once", "--json", "--interval", "0.1")
    assert done.returncode == 1 and "neither" in json.loads(done.stdout)["endpoints"][0]["error"]
    done = slip_top("nonsense://", "--once")
    assert done.returncode == 1 and done.stderr.count("slip: ") == 1 and "Traceback" not in done.stderr
