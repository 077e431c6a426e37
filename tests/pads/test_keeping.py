"""The stock of an owner: when it is filled, by whatever clock, and what is said to who asks for nonsense."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import SHAPES, Helper

from sliplm.errors import BundleError
from sliplm.pads import keeping
from sliplm.pads.keeping import Hours, Keeping
from sliplm.pads.pool import Pool


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The local time, to be set."""
    now = ["12:00"]
    monkeypatch.setattr(keeping.time, "localtime", lambda: time.strptime(now[0], "%H:%M"))
    return now


minutes = st.integers(0, 24 * 60 - 1)


def said(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


@given(minutes, minutes, minutes)
def test_hours_are_a_part_of_the_day_also_over_midnight(begin: int, end: int, now: int) -> None:
    if begin == end:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping.time, "localtime", lambda: time.strptime(said(now), "%H:%M"))
        inside, minute = set(), begin
        while minute != end:
            inside.add(minute)
            minute = (minute + 1) % (24 * 60)
        assert Hours(f"{said(begin)}-{said(end)}").now() == (now in inside)


@pytest.mark.parametrize(
    "wrong",
    ["", "22-06", "22:00", "24:00-06:00", "22:00-06:60", "22:00-22:00", "22:00–06:00", "2:00-6:00", " 22:00-06:00"],
)
def test_what_are_no_hours_is_one_sentence(wrong: str) -> None:
    with pytest.raises(BundleError, match="are no hours of the day: write HH:MM-HH:MM"):
        Keeping(100, fill_between=wrong)


def kept(*arguments: object) -> tuple[Pool, Helper]:
    pool = Pool(SHAPES, batch=4)
    Keeping(*arguments).rule(pool)  # type: ignore[arg-type]
    return pool, Helper(pool, "a")


def test_without_more_said_all_is_in_memory() -> None:
    assert (Keeping().depth, Keeping(0).depth, Keeping(1000).depth) == (64, 0, 1000)
    pool, helper = kept(200)
    helper.fill()
    assert (pool.level, pool.stored, pool.depth, pool.target) == (200, 0, 200, 200)


def test_the_stock_is_filled_at_night_and_used_by_day(clock: list[str], tmp_path: Path) -> None:
    pool, helper = kept(200, tmp_path, "22:00-06:00")
    assert pool.target == 64
    helper.fill()
    assert (pool.level, pool.stored) == (64, 0)
    clock[0] = "22:00"
    assert pool.target == 200
    helper.fill()
    assert (pool.level, pool.stored) == (200, 136)
    clock[0] = "06:00"
    for group in range(len(SHAPES)):
        pool.take(group, 100, "b")
    helper.fill()
    assert pool.level == 100  # enough for the day
    for group in range(len(SHAPES)):
        pool.take(group, 80, "b")
    helper.fill()
    assert pool.level == 64


def test_a_clock_that_jumps_over_the_night_costs_that_night_alone(clock: list[str], tmp_path: Path) -> None:
    pool, helper = kept(200, tmp_path, "22:00-06:00")
    for clock[0] in ("21:59", "06:00", "12:00"):
        helper.fill()
        assert pool.level == 64
    for clock[0] in ("23:00", "12:00", "02:00"):  # back and forth
        helper.fill()
        assert pool.level == 200


@pytest.mark.parametrize("given", [{"directory": "."}, {"fill_between": "22:00-06:00"}])
def test_a_stock_of_no_size_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(BundleError, match="say with --stock for how many tokens"):
        Keeping(None, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--pads-spill", "."], "say with --stock"),
        (["--stock", "100", "--pads-spill", "nowhere"], "cannot be kept in nowhere: no such file or directory"),
        (["--stock", "100", "--fill-between", "night"], "'night' are no hours of the day"),
    ],
)
def test_slip_trusted_says_so_before_it_loads_the_model(options: list[str], sentence: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sliplm.cli", "trusted", "no-bundle", "--listen", "127.0.0.1:0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and sentence in done.stderr
