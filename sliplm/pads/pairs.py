"""Pads that two helpers make: each is the sum of two, r = r1 + r2, from helpers of two parties.

Such a pad stays secret as long as one of the two keeps its key to itself. The pool takes every pair of parties for one
maker; this gives each of the two its half of what the pool wants from them.

A sum does not tell whose half was wrong, so here every image is checked when it comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from sliplm import field
from sliplm.errors import SlipError
from sliplm.pads.pad import Array, Maker
from sliplm.pads.parties import may_pair
from sliplm.pads.pool import BEAT_SECONDS, STALL_SECONDS, Pool
from sliplm.pads.stock import Job
from sliplm.prg import expand

AHEAD = 4
"""So many jobs of a pair may wait for one party while the other goes on: a slow one is not run away from."""


class Pair:
    """Two parties, as the pool knows them."""

    def __init__(self, parties: frozenset[str]) -> None:
        self.parties = parties
        self.name = "+".join(sorted(parties))

    def reject(self) -> None:
        """Raises SlipError: both halves were right when they came."""
        raise SlipError("one-time pads that were right have become wrong: this machine computes or remembers wrongly.")


class _Whole:
    """What the pool wants of a pair: by party, the halves that somebody works on, and the one that is done with its
    images."""

    def __init__(self, job: Job, pair: Pair) -> None:
        self.job, self.pair = job, pair
        self.given: dict[str, list[Job]] = {party: [] for party in pair.parties}
        self.done: dict[str, tuple[Job, Array]] = {}


class Pairs:
    """Stands between helpers and the pool, with what of its interface they use.

    Args:
        pool: what wants pads.
        shapes: (M, K) of every group.
        right: whether an image (T, M) of a group is that of r (T, K).

    A half whose helper died, stalled or was cut off is done by another of the same party, with a key of its own. If one
    that has stalled is first after all, it is welcome.
    """

    def __init__(self, pool: Pool, shapes: list[tuple[int, int]], right: Callable[[int, Array, Array], bool]) -> None:
        self._pool, self._shapes, self._right = pool, shapes, right
        self._changed = pool.changed  # one lock for both: what one knows of a job, the other knows
        self._helpers: dict[Maker, float] = {}  # and when each delivered last
        self._pairs: dict[frozenset[str], Pair] = {}
        self._wholes: list[_Whole] = []  # oldest first
        self._given: dict[Job, _Whole] = {}

    def hire(self, maker: Maker) -> None:
        """Let `maker`, of one party, ask for jobs."""
        party = _party(maker)
        with self._changed:
            self._helpers[maker] = time.monotonic()
            for other in self._parties():
                both = frozenset({party, other})
                if may_pair(party, other) and both not in self._pairs:
                    self._pairs[both] = Pair(both)
                    self._pool.hire(self._pairs[both])
            self._changed.notify_all()

    def dismiss(self, maker: Maker) -> None:
        """No more jobs for `maker`; others of its party do those that it has, or nobody if there are none."""
        with self._changed:
            if self._helpers.pop(maker, None) is None:
                return
            for job in [job for job in self._given if job.maker is maker]:
                self._take_back(job)
            for both in [both for both in self._pairs if not both <= self._parties()]:
                pair = self._pairs.pop(both)
                self._pool.dismiss(pair)
                for whole in [whole for whole in self._wholes if whole.pair is pair]:
                    self._end(whole)
            self._changed.notify_all()

    def drop(self, name: str) -> int:
        """Dismiss the helpers of this name and forget every unused pad that they had a part in; how many."""
        with self._changed:
            for job in [job for job in self._given if job.maker.name == name]:
                self._take_back(job)
            for whole in self._wholes:
                whole.done = {party: half for party, half in whole.done.items() if half[0].maker.name != name}
            for maker in [maker for maker in self._helpers if maker.name == name]:
                self.dismiss(maker)
            return self._pool.drop(name)

    def job(self, maker: Maker, timeout: float) -> Job | None:
        """The half that `maker` should make next; None if there is nothing for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while maker in self._helpers:
                waiting = (whole for whole in self._waiting(_party(maker)) if not _has(whole, maker))
                if (whole := next(waiting, None) or self._begin(_party(maker))) is not None:
                    return self._give(whole, maker)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, BEAT_SECONDS))
        return None

    def deliver(self, job: Job, images: Array) -> None:
        """Take the images (count, M) of a half; with both, the sum goes to the pool. A maker whose images are wrong is
        rejected."""
        with self._changed:
            if job not in self._given:
                return
        r = expand(job.key, 0, job.count, self._shapes[job.group][1])
        if not self._right(job.group, r, images):
            with self._changed:
                if job in self._given:
                    self._take_back(job)
            job.maker.reject()
            return
        with self._changed:
            if (whole := self._given.get(job)) is None:
                return
            self._take_back(job)
            self._helpers[job.maker] = time.monotonic()
            whole.done.setdefault(_party(job.maker), (job, images))
            if len(whole.done) < 2:
                return
            self._end(whole)
            (one, first), (other, second) = whole.done.values()
            whole.job.halves = one, other
        self._pool.deliver(whole.job, field.add(first, second))

    def _parties(self) -> set[str]:
        return {_party(maker) for maker in self._helpers}

    def _waiting(self, party: str) -> Iterator[_Whole]:
        """What was begun and lacks the half of `party`: nobody has it, or whoever has it has stalled."""
        late = time.monotonic() - STALL_SECONDS
        for whole in self._wholes:
            if (
                party in whole.given
                and party not in whole.done
                and all(max(half.issued, self._helpers[half.maker]) < late for half in whole.given[party])
            ):
                yield whole

    def _begin(self, party: str) -> _Whole | None:
        """What the pool wants of a pair with `party`, unless too much waits for the other one already."""
        for both, pair in self._pairs.items():
            if party not in both:
                continue
            (other,) = both - {party}
            if sum(whole.pair is pair for whole in self._waiting(other)) >= AHEAD:
                continue
            if (job := self._pool.job(pair, 0)) is not None:
                whole = _Whole(job, pair)
                self._wholes.append(whole)
                return whole
        return None

    def _give(self, whole: _Whole, maker: Maker) -> Job:
        half = Job(maker, whole.job.group, whole.job.count)
        whole.given[_party(maker)].append(half)
        self._given[half] = whole
        self._changed.notify_all()
        return half

    def _take_back(self, half: Job) -> None:
        self._given.pop(half).given[_party(half.maker)].remove(half)

    def _end(self, whole: _Whole) -> None:
        self._wholes.remove(whole)
        for halves in whole.given.values():
            for half in halves:
                del self._given[half]


def _party(maker: Maker) -> str:
    (party,) = maker.parties
    return party


def _has(whole: _Whole, maker: Maker) -> bool:
    return any(half.maker is maker for half in whole.given[_party(maker)])
