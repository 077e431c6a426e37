"""The words of a plan, and which blocks they name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import SlipError
from sliplm.split.places import places

BLOCKS = st.integers(1, 200)


def test_each_word() -> None:
    assert places("all", 3) == ["masked"] * 3
    assert places("first:1", 3) == ["masked", "open", "open"]
    assert places("last:1", 3) == ["open", "open", "masked"]
    assert places("trusted:2", 3) == ["trusted", "trusted", "open"]
    assert places("blocks:0,2-3", 5) == ["masked", "open", "masked", "masked", "open"]


@given(st.data(), BLOCKS)
def test_a_plan_names_what_its_ranges_name(data: st.DataObject, blocks: int) -> None:
    block = st.integers(0, blocks - 1)
    spans = data.draw(st.lists(st.tuples(block, block).map(sorted), min_size=1, max_size=5))
    found = places("blocks:" + ",".join(f"{a}-{b}" if a != b else str(a) for a, b in spans), blocks)
    masked = [any(a <= i <= b for a, b in spans) for i in range(blocks)]
    assert found == ["masked" if m else "open" for m in masked]


@given(BLOCKS, st.data())
def test_first_and_last_are_each_others_mirror(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, blocks))
    assert places(f"first:{count}", blocks) == places(f"last:{count}", blocks)[::-1]
    assert places(f"trusted:{blocks}", blocks) == ["trusted"] * blocks


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("first:0", "names 0 blocks, and this model has 4"),
        ("last:5", "names 5 blocks, and this model has 4"),
        ("trusted:99", "names 99 blocks"),
        ("blocks:4", "names block 4, and this model's are 0 to 3"),
        ("blocks:", "'' in the plan is no range"),
        ("blocks:3-1", "'3-1' in the plan is no range"),
        ("blocks:1,,2", "'' in the plan is no range"),
        ("blocks:-1", "'-1' in the plan is no range"),
        ("first:٣", "is no plan: write all, first:N"),
        ("first", "is no plan"),
        ("", "'' is no plan"),
        ("all ", "'all ' is no plan"),
        ("first:1\n", "is no plan"),
    ],
)
def test_what_is_no_plan(plan: str, sentence: str) -> None:
    with pytest.raises(SlipError, match=sentence.replace("(", r"\(")):
        places(plan, 4)


@given(st.text(max_size=20), BLOCKS)
def test_any_text_is_a_plan_or_refused(plan: str, blocks: int) -> None:
    try:
        assert len(places(plan, blocks)) == blocks
    except SlipError as error:
        assert "\n" not in str(error)
