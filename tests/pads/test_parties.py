"""Parties: no pad of theirs reaches an edge of theirs, however the names are written."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sliplm.pads.parties import may_pair, may_use

FORM = set(string.ascii_letters + string.digits + "._-")

# Mostly spellings of few names, so that the same party meets itself often; and anything else.
spellings = st.sampled_from(["acme", "a", "b-1", "k"]).flatmap(
    lambda name: st.tuples(*(st.sampled_from([c, c.upper()]) for c in name)).map("".join)
)
# K (Kelvin sign) lowers to k; full-width and Cyrillic letters look like others; spaces, ends of lines, zero-width ones.
tricks = st.sampled_from(
    ["\u212a", "\uff41", "\u0430cme", "\u017f", "\u0130", "acme\u200b", "acme\n", " acme", "\0", ""]
)
names = st.one_of(
    spellings,
    tricks,
    st.tuples(st.sampled_from(["", " ", "\t", "\n", "\u00a0"]), spellings, tricks).map("".join),
    st.text(max_size=3),
    st.sampled_from(["a" * 64, "A" * 64, "a" * 65]),
)


def is_name(text: str) -> bool:
    return 1 <= len(text) <= 64 and set(text) <= FORM


@given(st.frozensets(names, max_size=4), st.one_of(st.none(), names))
@example(frozenset({"Acme"}), "acme")
@example(frozenset({"b", "acme"}), "ACME")
@example(frozenset({"k"}), "\u212a")
@example(frozenset({""}), None)
def test_the_rule(makers: frozenset[str], edge: str | None) -> None:
    known = all(map(is_name, makers)) and (edge is None or is_name(edge))
    same = edge is not None and edge.casefold() in {maker.casefold() for maker in makers}
    assert may_use(makers, edge) == (known and not same)


@given(st.frozensets(names, max_size=3), names)
def test_no_spelling_gets_around_it(makers: frozenset[str], edge: str) -> None:
    """Neither another spelling of the edge's party nor makers of other parties beside it."""
    for spelling in (edge, edge.upper(), edge.lower(), edge.swapcase(), f" {edge}", f"{edge} ", f"{edge}\n"):
        assert not may_use(makers | {edge}, spelling)
        assert not may_use(makers | {spelling}, edge)


@given(names, names)
def test_a_pair_is_of_two_parties(one: str, other: str) -> None:
    assert may_pair(one, other) == may_pair(other, one)
    assert may_pair(one, other) == (is_name(one) and is_name(other) and one.lower() != other.lower())
    if may_pair(one, other):  # as a maker's and an edge's they may meet as well
        assert may_use(frozenset({one}), other)


def test_what_is_meant_to_work() -> None:
    assert may_use(frozenset(), None) and may_use(frozenset(), "acme")  # the trusted side's own pads
    assert may_use(frozenset({"acme"}), None)  # the owner's own edge
    assert may_use(frozenset({"acme"}), "bolt") and may_use(frozenset({"acme", "bolt"}), "Corp-3.1")


@pytest.mark.parametrize("makers", [{None}, {b"acme"}])
def test_no_name_is_no_permission(makers: set[object]) -> None:
    with pytest.raises(TypeError):
        may_use(frozenset(makers), "bolt")  # type: ignore[arg-type]
