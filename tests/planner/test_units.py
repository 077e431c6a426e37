"""Durations, bandwidths, budgets and lists, as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import SlipError
from sliplm.planner import units
from sliplm.planner.units import Budget

WRONG = [
    "",
    "20",
    "ms",
    "20 ms",
    "-1ms",
    "1e3ms",
    "20msx",
    "٣ms",
    "1.ms",
    "auto:",
    "0.0000001",
    "20ms\n",
    "nan",
    "infs",
]


def test_what_people_write() -> None:
    assert units.duration("20ms") == pytest.approx(0.02) and units.duration("0ms") == 0
    assert units.duration("200us") == pytest.approx(2e-4) and units.duration("1.5s") == 1.5
    assert units.bandwidth("1Gbit") == 125e6 and units.bandwidth("64kbit") == 8e3
    assert units.budget("auto:9rt") == Budget("round trips", 9)
    assert units.budget("auto:200ms") == Budget("seconds", pytest.approx(0.2))
    assert units.budget("auto:5%") == Budget("trusted share", 0.05)
    assert units.numbers("64,4,16,4") == [4, 16, 64]
    assert units.plans("all,blocks:0-3,28,trusted:2") == ["all", "blocks:0-3,28", "trusted:2"]


@pytest.mark.parametrize("parse", [units.duration, units.bandwidth, units.budget, units.numbers])
@pytest.mark.parametrize("text", WRONG)
def test_anything_else_is_one_sentence(parse: object, text: str) -> None:
    if parse is units.numbers and text == "20":
        return
    with pytest.raises(SlipError, match=r"^[^\n]*\.$"):
        parse(text)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.duration, "61s"),
        (units.duration, "999999999s"),
        (units.bandwidth, "0Gbit"),
        (units.bandwidth, "1Tbit"),
        (units.budget, "auto:101%"),
        (units.budget, "auto:1.5rt"),
        (units.budget, "auto:5"),
        (units.numbers, "0,4"),
        (units.plans, ",all"),
    ],
)
def test_what_cannot_be_is_refused(parse: object, text: str) -> None:
    with pytest.raises(SlipError, match=r"^[^\n]*\.$"):
        parse(text)  # type: ignore[operator]


@given(st.text(max_size=20))
def test_no_text_raises_anything_else(text: str) -> None:
    for parse in (units.duration, units.bandwidth, units.budget, units.numbers, units.plans):
        try:
            parse(text)
        except SlipError as error:
            assert re.fullmatch(r"[^\n]*\.", str(error))


@given(st.integers(0, 59_999), st.sampled_from(["us", "ms"]))
def test_durations_are_what_they_say(count: int, unit: str) -> None:
    assert units.duration(f"{count}{unit}") == pytest.approx(count * {"us": 1e-6, "ms": 1e-3}[unit])


@given(st.lists(st.sampled_from(["all", "first:2", "blocks:0-3,28", "blocks:1,2,3", "trusted:1"]), min_size=1))
def test_plans_are_told_apart(plans: list[str]) -> None:
    assert units.plans(",".join(plans)) == plans
