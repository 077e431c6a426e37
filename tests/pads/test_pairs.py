"""Pads of two helpers: the sum is right, no key has two owners, no pad is used twice, and no party has both halves."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import SHAPES, matrices

from sliplm.errors import BusyError, SlipError
from sliplm.pads import pairs as pairs_module
from sliplm.pads import pool as pool_module
from sliplm.pads.pairs import AHEAD, Pairs
from sliplm.pads.pool import Pool
from sliplm.pads.stock import Job
from sliplm.prg import expand

QS = matrices(*SHAPES)


def right(group: int, r: np.ndarray, image: np.ndarray) -> bool:
    return np.array_equal(QS[group].product(r), image)


class Helper:
    """One device of a party."""

    def __init__(self, pairs: Pairs, party: str, name: str) -> None:
        self.pairs, self.parties, self.name = pairs, frozenset({party}), name
        self.rejected = 0
        self.jobs: list[Job] = []
        pairs.hire(self)

    def reject(self) -> None:
        self.rejected += 1
        self.pairs.drop(self.name)

    def ask(self) -> Job | None:
        if job := self.pairs.job(self, 0):
            self.jobs.append(job)
        return job

    def finish(self, job: Job, lie: bool = False) -> None:
        self.jobs.remove(job)
        image = QS[job.group].product(expand(job.key, 0, job.count, SHAPES[job.group][1]))
        self.pairs.deliver(job, image ^ np.uint32(lie))


def paired(depth: int = 8, batch: int = 4) -> tuple[Pool, Pairs]:
    pool = Pool(SHAPES, depth, batch, patience=0)
    pool.expected = 2
    return pool, Pairs(pool, SHAPES, right)


def work(*helpers: Helper) -> None:
    """Until there is nothing to do."""
    busy = True
    while busy:
        busy = False
        for helper in helpers:
            if job := helper.ask():
                helper.finish(job)
                busy = True


def check_pad(pool: Pool, group: int, tokens: int, edge: str) -> np.ndarray:
    pad = pool.take(group, tokens, edge)
    mask = pad.mask()
    assert np.array_equal(QS[group].product(mask), pad.image)
    for part in pad._parts:
        assert len(part.batch._keys) == 2 == len(part.batch.names) == len(part.batch.maker.parties)
        assert edge not in part.batch.maker.parties
    return mask


def test_a_pad_is_the_sum_of_two_parties_and_used_with_a_third() -> None:
    pool, pairs = paired()
    a, b = Helper(pairs, "x", "a"), Helper(pairs, "y", "b")
    work(a, b)
    assert pool.level == 8 and [maker.name for maker in pool._makers] == ["x+y"]
    check_pad(pool, 0, 5, "z")
    for edge in ("x", "y", "X"):
        with pytest.raises(BusyError, match="no two helpers of two other parties than this edge's"):
            pool.take(0, 1, edge)
    assert pool.refused == 3


def test_one_party_alone_makes_no_pads() -> None:
    pool, pairs = paired()
    a, b = Helper(pairs, "x", "a"), Helper(pairs, "X", "b")  # one party, written twice
    assert a.ask() is None and b.ask() is None and not pool._makers
    c = Helper(pairs, "y", "c")
    work(a, b, c)
    assert {maker.name for maker in pool._makers} == {"x+y", "X+y"}


def test_the_second_half_is_for_the_other_party() -> None:
    _, pairs = paired()
    a, twin, b = Helper(pairs, "x", "a"), Helper(pairs, "x", "twin"), Helper(pairs, "y", "b")
    one = a.ask()
    other = twin.ask()  # begins another
    assert one and other and len(pairs._wholes) == 2
    halves = [b.ask(), b.ask()]
    assert [(h.group, h.count) for h in halves if h] == [(one.group, one.count), (other.group, other.count)]
    assert len({job.key for job in (one, other, *halves) if job}) == 4


def test_a_slow_party_is_not_run_away_from() -> None:
    pool, pairs = paired(depth=1000)
    a, _ = Helper(pairs, "x", "a"), Helper(pairs, "y", "b")
    while job := a.ask():
        a.finish(job)
    assert len(pairs._wholes) == AHEAD and pool.level == 0


@pytest.mark.parametrize("done", [False, True])
def test_a_helper_that_leaves_is_replaced_by_one_of_its_party(done: bool) -> None:
    """What it had finished counts."""
    pool, pairs = paired(depth=4)
    a, b, twin = Helper(pairs, "x", "a"), Helper(pairs, "y", "b"), Helper(pairs, "x", "twin")
    jobs = [job for _ in SHAPES if (job := a.ask())]
    for job in jobs:
        if done:
            a.finish(job)
    pairs.dismiss(a)
    work(b)
    again = twin.ask()
    assert (again is None) == done and pool.level == (4 if done else 0)
    if again:
        assert again.key not in {job.key for job in jobs}
        twin.finish(again)
        work(twin)
        a.jobs and a.finish(a.jobs[0])  # too late
        assert pool.level == 4


def test_the_last_of_a_party_takes_its_pairs_with_it() -> None:
    pool, pairs = paired(depth=4)
    a, b = Helper(pairs, "x", "a"), Helper(pairs, "y", "b")
    a.ask()
    b.ask()
    pairs.dismiss(b)
    assert not pool._makers and not pairs._wholes and not pairs._given and not pool._jobs
    b = Helper(pairs, "y", "b")
    work(a, b)
    assert pool.level == 4


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pairs_module, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.05)
    yield


@pytest.mark.parametrize("first", ["twin", "stalled"])
def test_what_a_stalled_helper_has_is_given_to_its_twin_too(impatient: None, first: str) -> None:
    pool, pairs = paired(depth=4)
    a, b, twin = Helper(pairs, "x", "a"), Helper(pairs, "y", "b"), Helper(pairs, "x", "twin")
    stalled = a.ask()
    assert stalled
    while job := b.ask():
        b.finish(job)
    time.sleep(0.1)
    again = twin.ask()
    assert again and (again.group, again.count) == (stalled.group, stalled.count) and again.key != stalled.key
    a.finish(stalled) if first == "stalled" else twin.finish(again)
    assert pool._totals()[stalled.group] == 4
    twin.finish(again) if first == "stalled" else a.finish(stalled)
    assert pool._totals()[stalled.group] == 4  # of two, one counts
    work(a, b, twin)
    for group in (0, 1):
        check_pad(pool, group, 4, "z")
    assert not pairs._given and not pairs._wholes


def test_a_lie_is_caught_when_it_comes_and_all_that_its_maker_had_a_part_in_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "JOB_ROWS", 4)
    pool, pairs = paired(depth=8)
    a, b, liar = Helper(pairs, "x", "a"), Helper(pairs, "y", "b"), Helper(pairs, "y", "liar")
    for partner in (b, liar):
        for _ in range(2):
            one = a.ask()
            other = partner.ask()
            assert one and other
            a.finish(one), partner.finish(other)
    assert pool._totals() == [8, 8]
    check_pad(pool, 0, 4, "z")  # those of b
    one, other = a.ask(), liar.ask()
    assert one and other
    liar.finish(other, lie=True)
    assert (liar.rejected, b.rejected, a.rejected) == (1, 0, 0) and liar.ask() is None
    assert pool._totals() == [0, 4]
    a.finish(one)
    work(a, b)
    assert pool._totals() == [8, 8]
    for stock in pool._stocks.values():
        for ready in stock.ready:
            assert all("liar" not in part.batch.names for part in ready)
    for group in (0, 1):
        check_pad(pool, group, pool._totals()[group], "z")


def test_pads_that_became_wrong_are_nobodys_lie() -> None:
    pool, pairs = paired()
    work(Helper(pairs, "x", "a"), Helper(pairs, "y", "b"))
    pad = pool.take(0, 1, "z")
    with pytest.raises(SlipError, match="computes or remembers wrongly"):
        pad.blame(lambda *_: False)


NAMES = {"a1": "a", "a2": "a", "b1": "b", "b2": "B", "c1": "c"}
events = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "finish", "finish", "lie", "leave", "drop", "come", "stall", "take"]),
    st.sampled_from(sorted(NAMES)),
    st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=80))
def test_whatever_the_order_keys_and_pads_have_one_owner_and_parties_stay_apart(
    steps: list[tuple[str, str, int]],
) -> None:
    pool, pairs = paired(depth=6, batch=2)
    now = [1000.0]
    keys: dict[bytes, str] = {}
    used: list[bytes] = []
    banned: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        helpers = {name: Helper(pairs, party, name) for name, party in NAMES.items()}
        for what, name, number in steps:
            helper = helpers[name]
            if what == "ask":
                if job := helper.ask():
                    assert name not in banned and job.key not in keys
                    keys[job.key] = name
            elif what in ("finish", "lie") and number < len(helper.jobs):
                job, rejected = helper.jobs[number], helper.rejected
                known = job in pairs._given
                helper.finish(job, what == "lie")
                assert helper.rejected - rejected == (known and what == "lie")
                if helper.rejected > rejected:
                    banned.add(name)
            elif what == "leave":
                pairs.dismiss(helper)
            elif what == "drop":
                pairs.drop(name)
                banned.add(name)
            elif what == "come":
                banned.discard(name)
                pairs.hire(helper)
            elif what == "stall":
                now[0] += pairs_module.STALL_SECONDS + 0.1
            elif what == "take":
                edge = ["a", "B", "c", "z"][number]
                try:
                    pad = pool.take(number % 2, 3, edge)
                except BusyError:
                    continue
                mask = pad.mask()
                assert np.array_equal(QS[number % 2].product(mask), pad.image)
                used += [row.tobytes() for row in mask]
                for part in pad._parts:
                    owners = {keys[key] for key in part.batch._keys}
                    parties = {NAMES[owner].lower() for owner in owners}
                    assert owners == part.batch.names and len(owners) == len(parties) == 2
                    assert edge.lower() not in parties and not owners & banned
            for stock in pool._stocks.values():
                assert all(coming >= 0 for coming in stock.coming)
                assert stock.levels == [sum(part.count for part in ready) for ready in stock.ready]
            assert set(pairs._given) == {half for w in pairs._wholes for given in w.given.values() for half in given}
            assert {whole.job for whole in pairs._wholes} == pool._jobs
    assert len(used) == len(set(used))


def test_a_runtime_checks_with_its_operators_secrets() -> None:
    from sliplm.exchange.check import secrets
    from sliplm.exchange.operator import Operator
    from sliplm.trusted.runtime import Runtime

    rng = np.random.default_rng(0)  # as `matrices` draws
    qs = [rng.integers(-127, 128, shape).astype(np.int8) for shape in SHAPES]
    operators = [
        Operator(i, q.shape, 1000.0, np.ones((1, len(q)), np.float32), None, None, *secrets(q))
        for i, q in enumerate(qs)
    ]
    runtime = Runtime(operators, bytes(32))
    pairs = runtime.take_helpers(2)
    assert isinstance(pairs, Pairs) and runtime.take_helpers() is runtime.pool
    honest, liar = Helper(pairs, "x", "honest"), Helper(pairs, "y", "liar")
    one, other = honest.ask(), liar.ask()
    assert one and other
    honest.finish(one), liar.finish(other, lie=True)
    assert (honest.rejected, liar.rejected) == (0, 1)
    work(honest, Helper(pairs, "y", "other"))
    check_pad(runtime.pool, 1, 64, "z")
