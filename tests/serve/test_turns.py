"""Fair turns: by themselves, and as devices meet them over real sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
from link_fakes import (
    FakeEngine,
    ask,
    enrol,
    running,
    serving,
    text,
    usage,
    wait_until,
    working,
)

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BusyError, IdentityError, LinkError
from sliplm.serve.fair import FairQueue, Ticket


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


# --- over the wire --------------------------------------------------------------------------------


def test_requests_wait_for_their_turn_and_can_be_cancelled(home: Path) -> None:
    engine = FakeEngine(0.01)
    engine.capacity = 1
    with serving(home, engine) as server, working(server, enrol(home)) as worker:
        running = worker.generate(ask(words=10_000))
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
        running = worker.generate(ask(words=10_000))
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
        flood = [worker.generate(ask(words=100_000)) for _ in range(20)]
        for generation in flood:
            stack.callback(generation.close)
            next(generation)  # text, or a sign of life
        late = other.generate(ask(words=2))
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
            slow = worker.generate(ask(words=10_000))
            second = worker.generate(ask())
            next(slow), next(second)
            for _ in range(30):  # its own device's request does not cut it off
                next(slow)
            assert text(other)
            with pytest.raises(LinkError, match="too slow while another device waited"):
                list(slow)
            second.close()
        wait_until(lambda: usage(home)[0][2] == "interrupted")
