"""Fair turns and limits: by themselves, and as devices meet them over real sockets."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from link_fakes import DIGEST, SHAPES, FakeEngine, break_registry, enrol, running, serving, wait_until, working

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, IdentityError, InternalError, LimitError, LinkError, RequestError
from sliplm.exchange.link import Link
from sliplm.protocol import tls
from sliplm.protocol.channel import connect
from sliplm.protocol.frames import Kind, Role
from sliplm.protocol.messages import Chunk, GenerateRequest, TokenLogprob
from sliplm.registry import Device, Limits, authority
from sliplm.registry.usage import Used, midnight
from sliplm.serve import meter
from sliplm.serve.fair import FairQueue, Ticket
from sliplm.serve.limits import Limiter
from sliplm.serve.server import TrustedServer


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "authority"


def ask(words: int = 3, prompt: str = "hi") -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=words)


def text(worker: EdgeWorker, request: GenerateRequest | None = None) -> str:
    return "".join(chunk.text for chunk in worker.generate(request or ask()))


def usage(home: Path) -> list[tuple[int, int, str | None]]:
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as db:
        return db.execute("SELECT prompt_tokens, completion_tokens, outcome FROM usage ORDER BY id").fetchall()


# --- fair turns -----------------------------------------------------------------------------------


def test_a_device_with_many_requests_does_not_starve_one_with_few() -> None:
    queue = FairQueue(slots=2)
    many = [queue.join("many") for _ in range(100)]
    few = [queue.join("few") for _ in range(2)]
    order = served(queue, many + few)
    assert len(order) == 102 and queue.waiting == 0
    assert max(order.index(t) for t in few) <= 4


def served(queue: FairQueue, tickets: list[Ticket]) -> list[Ticket]:
    """In the order of their turns, each leaving after the next one."""
    order: list[Ticket] = []
    left = 0
    while queue.running:
        order += [t for t in tickets if t not in order and t.wait(0)]
        order[left].__exit__()
        left += 1
    return order


def test_slots_go_round() -> None:
    queue = FairQueue(slots=1)
    tickets = [queue.join(name) for name in "aaabbbccc"]
    assert "".join(t.device for t in served(queue, tickets)) == "abcabcabc"


def test_a_device_never_holds_more_slots_than_it_may() -> None:
    queue = FairQueue(slots=8)
    tickets = [queue.join("a", concurrent=3) for _ in range(8)]
    assert [t.wait(0) for t in tickets] == [True] * 3 + [False] * 5
    assert queue.join("b", concurrent=3).wait(0)  # who waits for nobody else's sake holds nobody up
    tickets[0].__exit__()
    assert tickets[3].wait(0) and not tickets[4].wait(0)


def test_the_queue_is_bounded_and_forgets_who_leaves() -> None:
    queue = FairQueue(slots=1, max_waiting=3, max_waiting_per_device=2)
    running = queue.join("a")
    first, second = queue.join("a"), queue.join("a")
    with pytest.raises(BusyError, match="this device") as caught:
        queue.join("a")
    assert caught.value.retry_after
    queue.join("b")
    with pytest.raises(BusyError, match="the trusted side"):
        queue.join("c")
    first.__exit__()
    assert queue.waiting == 2
    running.__exit__()
    third = queue.join("a")
    queue.refuse(IdentityError("revoked"), "a")
    for ticket in (second, third):
        with contextlib.suppress(IdentityError):
            assert ticket.wait(0)
        ticket.__exit__()
    assert queue.waiting == 0 and queue.running == 1  # b


def test_who_holds_a_slot_too_long_gives_it_up_to_a_device_without_one() -> None:
    queue = FairQueue(slots=3)
    slow, slower, new = queue.join("a"), queue.join("a"), queue.join("b")
    slow.due, slower.due = time.monotonic() - 1, time.monotonic() - 2
    queue.join("b")
    assert not any(map(queue.wants_back, (slow, slower, new)))  # "b" has a slot
    queue.join("c")
    assert [queue.wants_back(t) for t in (slow, slower, new)] == [False, True, False]
    slow.due = slower.due = time.monotonic() + 10
    assert not any(map(queue.wants_back, (slow, slower, new)))


def test_threads_that_come_and_go_leave_nothing_behind() -> None:
    queue = FairQueue(slots=3)
    peak, lock = [0], threading.Lock()

    def use(device: str) -> None:
        for i in range(30):
            with queue.join(device, 2) as ticket:
                if i % 3 == 0:
                    ticket.wait(0.0001)
                    continue  # hangs up
                assert ticket.wait(30)
                with lock:
                    peak[0] = max(peak[0], queue.running)

    threads = [threading.Thread(target=use, args=(f"d{i % 4}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert queue.running == queue.waiting == 0 and peak[0] <= 3 and not queue._running


# --- tokens ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def calendar(self) -> datetime:
        return datetime(2026, 1, 1, 23, 0, tzinfo=timezone.utc) + timedelta(seconds=self.seconds)


def device(**limits: int) -> Device:
    time = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return Device(id=1, name="d", fingerprint="f", added=time, expires=time, limits=Limits(**limits))


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
        generation = worker.generate(ask(10_000))
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
        generation = worker.generate(ask(10_000))
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
        chunks = list(worker.generate(ask(100)))
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
        chunks = list(worker.generate(ask(100)))
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
        first, second = worker.generate(ask(10)), worker.generate(ask(10))
        next(first)
        assert next(second).text == ""  # admitted, and in the queue
        assert list(first)[-1].finish_reason == "length"
        with pytest.raises(LimitError, match="this device may use 10 tokens a"):
            list(second)
    assert len(engine.requests) == 1


def test_requests_wait_for_their_turn_and_can_be_cancelled(home: Path) -> None:
    engine = FakeEngine(0.01)
    engine.capacity = 1
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        running = worker.generate(ask(10_000))
        next(running)
        waiting = [worker.generate(ask()) for _ in range(2)]
        texts: list[str] = []
        threads = [threading.Thread(target=lambda g=g: texts.extend(c.text for c in g)) for g in waiting[:1]]
        for thread in threads:
            thread.start()
        assert next(waiting[1]).text == ""  # a sign of life
        assert len(engine.requests) == 1 and server.service.queue.waiting == 2
        waiting[1].close()
        wait_until(lambda: server.service.queue.waiting == 1)
        running.close()
        threads[0].join(30)
        assert "".join(texts) == "word0 word1 word2 "


def test_nobody_waits_forever(home: Path) -> None:
    engine = FakeEngine(0.01)
    engine.capacity = 1
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        server.service._queue_seconds = 0.1
        running = worker.generate(ask(10_000))
        next(running)
        with pytest.raises(BusyError, match="try again later") as caught:
            text(worker)
        assert caught.value.retry_after
        running.close()


def test_a_device_that_floods_holds_up_nobody_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.serve.service.BEAT_SECONDS", 0.05)
    engine = FakeEngine(0.01)
    engine.capacity = 2
    with serving(home, engine) as server, working(server, enrol(home)) as worker, contextlib.ExitStack() as stack:
        other = stack.enter_context(working(server, enrol(home, "other")))
        flood = [worker.generate(ask(100_000)) for _ in range(20)]
        for generation in flood:
            stack.callback(generation.close)
            next(generation)  # text, or a sign of life
        late = other.generate(ask(2))
        assert next(late).text == "" and server.service.queue.waiting == 19
        flood[0].close()
        assert list(late)[-1].finish_reason and server.service.queue.waiting >= 17


def test_a_slow_request_ends_when_another_device_needs_its_slot(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.serve.service.BEAT_SECONDS", 0.02)
    monkeypatch.setattr("sliplm.serve.service.SLOT_SECONDS", 0.1)
    monkeypatch.setattr("sliplm.serve.service.SLOT_SECONDS_PER_TOKEN", 0.01)
    engine = FakeEngine(0.02)
    engine.capacity = 1
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        other = EdgeWorker(engine._truth, server.address, enrol(home, "other"))
        with running(other.run, other.stop):
            assert other.connected.wait(10)
            slow = worker.generate(ask(10_000))
            second = worker.generate(ask())
            next(slow), next(second)
            for _ in range(30):  # its own device's request does not cut it off
                next(slow)
            assert text(other)
            with pytest.raises(LinkError, match="too slow while another device waited"):
                list(slow)
            second.close()
        wait_until(lambda: usage(home)[0][2] == "interrupted")


# --- a registry that fails ------------------------------------------------------------------------


def test_nothing_is_generated_that_cannot_be_recorded(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meter, "UPDATE_SECONDS", 0.05)
    monkeypatch.setattr(meter, "GRACE_SECONDS", 0.5)
    with serving(home, FakeEngine(0.01)) as server, working(server, enrol(home)) as worker:
        generation = worker.generate(ask(100_000))
        next(generation)
        with monkeypatch.context() as patch:
            break_registry(patch, server)
            with pytest.raises(BusyError, match="cannot record usage"):
                list(generation)
            assert not server.ready
            with pytest.raises(LinkError, match="cannot look this device up"):
                text(worker)
        wait_until(lambda: usage(home)[0][2] == "busy")  # written when it can be
        wait_until(lambda: server.ready)
        assert text(worker)
        assert "disk I/O error" in caplog.text and usage(home)[0][1] > 0


def test_a_locked_registry_refuses_new_requests(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.registry.database.BUSY_SECONDS", 0.2)
    with serving(home) as server, working(server, enrol(home)) as worker:
        other = sqlite3.connect(home / "registry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError, match="cannot record usage just now: try again later"):
            text(worker)
        other.execute("ROLLBACK")
        other.close()
        assert text(worker)
    assert usage(home) == [(3, 3, "length")]


# --- devices that may not stay, and the server's own end --------------------------------------------


def ended(generation: object, within: float) -> tuple[BaseException, float]:
    """The exception that ends a generation, and how long it took."""
    started = time.monotonic()
    with pytest.raises(Exception) as caught:
        list(generation)  # type: ignore[call-overload]
    took = time.monotonic() - started
    assert took < within
    return caught.value, took


@pytest.mark.parametrize("how", ["revoke", "suspend"])
def test_revocation_cuts_running_and_waiting_requests(home: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.serve.connections.CUT_SECONDS", 20.0)  # so that it is not what does it
    engine = FakeEngine(0.01)
    engine.capacity = 1
    identity = enrol(home)
    with serving(home, engine) as server:
        worker = EdgeWorker(FakeEngine()._truth, server.address, identity)
        with running(worker.run, worker.stop) as raised:
            assert worker.connected.wait(10)
            first = worker.generate(ask(100_000))
            next(first)
            second = worker.generate(ask())
            next(second)
            with authority.open_registry(home) as registry:
                if how == "revoke":
                    registry.devices.revoke("laptop")
                else:
                    registry.devices.suspend(registry.devices.get("laptop"), "a test")
            for generation in (first, second):
                error, _ = ended(generation, within=20)
                assert isinstance(error, IdentityError) and how[:6] in str(error)
            wait_until(lambda: bool(raised) and not server._connections)
            assert isinstance(raised[0], IdentityError)
    assert next(outcome for *_, outcome in usage(home)) == "interrupted"


class Endless(FakeEngine):
    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        while True:
            yield Chunk("x" * 500_000)


def test_a_device_that_does_not_read_is_cut_all_the_same(home: Path) -> None:
    """Its request's thread waits for room in the socket, and sees no reason to stop."""
    identity = enrol(home)
    with serving(home, Endless()) as server:
        worker = EdgeWorker(Endless()._truth, server.address, identity)
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            silent, _ = connect(server.address, tls.client_context(identity), Role.REQUEST, DIGEST, 10)
            silent.send(Kind.GENERATE, b'{"prompt": "hi"}')
            wait_until(lambda: server.service.queue.running == 1)
            time.sleep(0.3)  # the socket fills
            authority.revoke_device(home, "laptop")
            wait_until(lambda: not server._connections, 10)
            silent.close()


def test_a_drain_lets_running_requests_finish(home: Path) -> None:
    engine = FakeEngine(0.02)
    engine.capacity = 1
    server = TrustedServer(engine, DIGEST, SHAPES, home)
    with running(server.serve_forever, server.close) as raised:
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            first = worker.generate(ask(50))
            next(first)
            second = worker.generate(ask())
            next(second)
            server.drain(30)
            assert not server.ready
            with pytest.raises(BusyError, match="shutting down"):
                list(second)
            assert list(first)[-1].finish_reason == "length"
            assert server._stopped.wait(10)
            with pytest.raises(LinkError):
                text(worker)
    assert not raised and [outcome for *_, outcome in usage(home)] == ["length", "busy"]


@pytest.mark.parametrize("how", ["time runs out", "close"])
def test_a_drain_ends(home: Path, how: str) -> None:
    engine = FakeEngine(0.02)
    server = TrustedServer(engine, DIGEST, SHAPES, home)
    with running(server.serve_forever, server.close) as raised:
        worker = EdgeWorker(engine._truth, server.address, enrol(home))
        with running(worker.run, worker.stop):
            assert worker.connected.wait(10)
            first = worker.generate(ask(100_000))
            next(first)
            server.drain(0.2 if how == "time runs out" else 600)
            if how == "close":
                server.close()
            error, _ = ended(first, within=20)
            assert isinstance(error, LinkError) and not isinstance(error, RequestError)
    assert not raised and [outcome for *_, outcome in usage(home)] == ["interrupted"]
