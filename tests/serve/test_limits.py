"""Limits: by themselves, and as devices meet them over real sockets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from link_fakes import (
    FakeEngine,
    ask,
    enrol,
    serving,
    text,
    usage,
    wait_until,
    working,
)

from sliplm.errors import InternalError, LimitError
from sliplm.exchange.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest, TokenLogprob
from sliplm.registry import Device, Limits, authority
from sliplm.registry.usage import Used, midnight
from sliplm.serve import meter
from sliplm.serve.limits import Limiter


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def calendar(self) -> datetime:
        return datetime(2026, 1, 1, 23, 0, tzinfo=timezone.utc) + timedelta(seconds=self.seconds)


def device(**limits: int) -> Device:
    time = datetime(2026, 1, 1, tzinfo=timezone.utc)
    roles = {"party": "d", "edge": True, "helper": False}
    return Device(id=1, name="d", fingerprint="f", added=time, expires=time, limits=Limits(**limits), **roles)


def test_tokens_a_minute() -> None:
    clock = Clock()
    limiter = Limiter(Limits(tokens_per_minute=60), clock, clock.calendar)
    one = device()
    limiter.admit(one)
    assert limiter.charge(one, 90)  # a request that has begun runs to its end
    with pytest.raises(LimitError, match="60 tokens a minute") as caught:
        limiter.admit(one)
    assert caught.value.retry_after == 31
    clock.seconds += 30
    with pytest.raises(LimitError):
        limiter.admit(one)
    clock.seconds += 1
    limiter.admit(one)
    clock.seconds += 1e6
    limiter.charge(one, 60)  # a bucket holds one minute's tokens, however long nobody came
    with pytest.raises(LimitError):
        limiter.admit(one)
    limiter.admit(device(tokens_per_minute=0))  # its own limit: none


def test_over_time_the_rate_holds() -> None:
    clock, used = Clock(), 0
    limiter, one = Limiter(Limits(tokens_per_minute=600), clock, clock.calendar), device()
    for size in itertools.islice(itertools.cycle([7, 900, 50]), 3000):
        clock.seconds += 1
        with contextlib.suppress(LimitError):
            limiter.admit(one)
            limiter.charge(one, size)
            used += size
    assert 0.95 * 10 * 3000 < used < 10 * 3000 + 600 + 900


def test_tokens_a_day() -> None:
    clock = Clock()
    limiter = Limiter(Limits(daily_tokens=100), clock, clock.calendar)
    one = device()
    today = midnight(clock.calendar())
    limiter.recall(one, Used(today, 40))  # what the registry knows from before
    assert limiter.charge(one, 59)
    limiter.recall(one, Used(today, 50))  # which may lag behind
    assert not limiter.charge(one, 1)
    with pytest.raises(LimitError, match="100 tokens a day") as caught:
        limiter.admit(one)
    assert caught.value.retry_after == 3600
    clock.seconds += 3600
    limiter.recall(one, Used(today, 100))  # the registry was asked just before midnight
    limiter.admit(one)


# --- over the wire --------------------------------------------------------------------------------


def test_every_request_has_one_usage_record(home: Path) -> None:
    engine = FakeEngine(0.01)
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        text(worker)
        for prompt in ("boom", "layer"):
            with pytest.raises(InternalError):
                text(worker, ask(prompt=prompt))
        generation = worker.generate(ask(words=10_000))
        for _ in range(3):
            next(generation)
        generation.close()
        assert engine.cancelled.wait(10)
        wait_until(lambda: len(usage(home)) == 4 and all(outcome for *_, outcome in usage(home)))
    records = usage(home)
    assert records[:3] == [(3, 3, "length"), (0, 0, "failed"), (0, 0, "failed")]
    assert records[3][2] == "cancelled" and records[3][1] >= 3
    assert b'requests_total{outcome="cancelled"} 1.0' in server.service.metrics.text()
    assert b'tokens_total{kind="prompt"} 6.0' in server.service.metrics.text()


def test_the_running_tokens_are_recorded_meanwhile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "UPDATE_SECONDS", 0.05)
    with serving(home, FakeEngine(0.01)) as server, working(server, enrol(home)) as worker:
        generation = worker.generate(ask(words=10_000))
        next(generation)
        wait_until(lambda: usage(home)[0][1] > 3)
        assert usage(home)[0][2] is None
        generation.close()


def test_a_rate_that_is_used_up(home: Path) -> None:
    with serving(home, limits=Limits(tokens_per_minute=5)) as server, working(server, enrol(home)) as worker:
        assert text(worker)  # 3 + 3 tokens
        with pytest.raises(LimitError, match="5 tokens a minute") as caught:
            text(worker)
        assert 1 <= (caught.value.retry_after or 0) <= 30
        assert len(usage(home)) == 1  # a refusal costs no record
        with working(server, enrol(home, "other")) as other:
            assert text(other)
        with authority.open_registry(home) as registry:
            registry.devices.limit("laptop", Limits(tokens_per_minute=0))
        assert text(worker)  # from its next request on


def test_a_daily_quota_ends_a_request_and_outlives_the_server(home: Path) -> None:
    identity = enrol(home)
    with serving(home, limits=Limits(daily_tokens=10)) as server, working(server, identity) as worker:
        chunks = list(worker.generate(ask(words=100)))
        assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == ("length", 7)
    again = serving(home, limits=Limits(daily_tokens=10))
    with again as server, working(server, identity) as worker, pytest.raises(LimitError, match="10 tokens a day"):
        text(worker)
    assert usage(home) == [(3, 7, "length"), (0, 0, "limited")]


def test_the_piece_that_a_quota_cuts_is_whole(home: Path) -> None:
    class Scoring(FakeEngine):
        def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
            for chunk in super().generate(request, link):
                yield msgspec.structs.replace(chunk, logprobs=[TokenLogprob(chunk.text, -0.5)])

    with serving(home, Scoring(), limits=Limits(daily_tokens=10)) as server, working(server, enrol(home)) as worker:
        chunks = list(worker.generate(ask(words=100)))
    assert chunks[-1].finish_reason == "length" and chunks[-1].completion_tokens < 100
    assert [p.token for c in chunks for p in c.logprobs] == [c.text for c in chunks if c.text]


@pytest.mark.parametrize("limits", [Limits(daily_tokens=10), Limits(tokens_per_minute=10)])
def test_requests_that_waited_are_held_to_what_is_left(
    home: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.serve.service.BEAT_SECONDS", 0.02)
    engine = FakeEngine(0.1)
    engine.capacity = 1
    with serving(home, engine, limits=limits) as server, working(server, enrol(home)) as worker:
        first, second = worker.generate(ask(words=10)), worker.generate(ask(words=10))
        next(first)
        assert next(second).text == ""  # admitted, and in the queue
        assert list(first)[-1].finish_reason == "length"
        with pytest.raises(LimitError, match="this device may use 10 tokens a"):
            list(second)
    assert len(engine.requests) == 1
