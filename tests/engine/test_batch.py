"""Answers that are generated together: each is what it is alone, whatever happens to the others."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import WORDS, Through, alone, ask, assert_same, at_once, gather, requests, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import attached

from sliplm.engine import answer, batch
from sliplm.engine.batch import Batch, Batches
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.sequence import Sequence
from sliplm.errors import LinkError
from sliplm.processes import memory
from sliplm.protocol.messages import GenerateRequest
from sliplm.trusted.packed import Packed


@pytest.fixture(scope="module")
def shared(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0, allow_logprobs=True))


@pytest.fixture
def engine(shared: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[BuiltinEngine]:
    monkeypatch.setattr(answer, "BEAT_SECONDS", 0.02)
    yield shared
    assert not threads() and not shared._batches.running


@pytest.mark.parametrize("rows", [batch.ROWS, 7])
def test_answers_are_those_that_each_gets_alone(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(batch, "ROWS", rows)
    monkeypatch.setattr(batch, "ROWS_ALONE", 2 * rows)
    generator = random.Random(rows)
    asked = requests(generator, 32)
    got = at_once(engine, asked, generator)
    assert_same(got, alone(engine, monkeypatch, asked), 1e-3)
    if isinstance(engine._batches.way, Packed):
        assert got == [ask(engine, **what) for what in asked]  # in no company: to the last bit


def test_many_share_a_pass(engine: BuiltinEngine) -> None:
    """Three answers of 20 tokens take the exchanges of one, and few more."""
    go = threading.Event()
    link = Through(engine, lambda _: go.wait(10))
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, engine, link, prompt=word, max_tokens=20) for word in WORDS[:3]]
        wait_for(engine, 3)
        go.set()
        assert all(a.result().tokens == 20 for a in answers)
    assert link.count <= 9 * 22


def wait_for(engine: BuiltinEngine, count: int) -> None:
    """Until so many have joined a batch, which cannot go on meanwhile."""
    while not engine._batches.running:
        time.sleep(0.01)
    (running,) = engine._batches.running.values()
    while len(running._sequences) + len(running._joining) < count:
        time.sleep(0.01)


def test_prompts_share_the_room_that_tokens_leave(engine: BuiltinEngine) -> None:
    def make(tokens: int, begun: bool = False) -> Sequence:
        one = Sequence([65] * tokens, 9, (), engine.decoding.processors(GenerateRequest(prompt="x"), 1), None, None)
        one.begun, one._known = begun, (tokens - 1) * begun
        return one

    def shares(*sequences: Sequence) -> list[int]:
        found = {s: len(part.tokens) for s, part in Batch(engine._batches, link)._shares(list(sequences), True)}
        return [found[s] for s in sequences]

    link = engine.model.slip.default_link
    decoding = [make(300, begun=True) for _ in range(8)]
    assert shares(*decoding) == [1] * 8
    assert shares(make(5000), make(10), *decoding) == [batch.ROWS - 8 - 10, 10, *[1] * 8]
    assert shares(make(5000), make(5000), make(30), *decoding) == [45, 45, 30, *[1] * 8]
    assert shares(make(5000), make(20)) == [batch.ROWS_ALONE - 20, 20]
    assert sum(shares(*(make(50) for _ in range(16)))) == batch.ROWS_ALONE


def test_a_short_prompt_need_not_wait_for_a_long_one(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWS", "ROWS_ALONE"):
        monkeypatch.setattr(batch, name, 4)
    go, passes = threading.Event(), list[int]()
    link = Through(engine, lambda count: go.wait(10))
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, engine, link, prompt="x" * 100, max_tokens=1)
        short = pool.submit(ask, engine, link, prompt="abc", max_tokens=3)
        short.add_done_callback(lambda _: passes.append(link.count // 9))
        wait_for(engine, 2)
        go.set()
        assert short.result().tokens == 3 and long.result().tokens == 1
    assert passes[0] < 25  # that the long one takes alone


def test_links_do_not_share(engine: BuiltinEngine) -> None:
    links = [Through(engine) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert len({got.text for got in pool.map(lambda link: ask(engine, link), links)}) == 1
    assert all(link.count == 9 * 12 for link in links)


@pytest.mark.slow
def test_the_real_models_answers_are_those_that_each_gets_alone(
    smollm2_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = attached(BuiltinEngine(smollm2_split / "trusted", stock=0, allow_logprobs=True))
    generator = random.Random(1)
    asked = requests(generator, 32)
    for what in asked:
        what["max_tokens"] = min(what["max_tokens"], 10)
    assert_same(at_once(engine, asked, generator), alone(engine, monkeypatch, asked), 0.02)


@pytest.mark.slow
def test_schemas_among_others(engine: BuiltinEngine) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    held = {"schema": schema, "temperature": 1.0, "seed": 1, "max_tokens": 40}
    asked = [held, {}, {**held, "seed": 2}, {"temperature": 1.0, "seed": 7}, {"logprobs": 1}]
    want = [ask(engine, **what) for what in asked]
    assert at_once(engine, asked, random.Random(1)) == want and '"n"' in want[0].text
    engine._grammars().close()


# --- the order of things -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["join", "leave", "hold", "read"]), st.integers(0, 9)), max_size=25),
    st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_they_join_and_leave_at_any_step(shared: BuiltinEngine, happens: list[tuple[str, int]], rows: int) -> None:
    """Step by step, without the thread: after any history each has the tokens that it has alone."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(batch, "ROWS", rows)
        patch.setattr(batch, "ROWS_ALONE", rows)
        patch.setattr(answer, "AHEAD", 5)
        batches = Batches(shared.model, shared._batches.way, shared._batches.drafting)
        running = batches.running[0] = Batch(batches, shared.model.slip.default_link)
        running._key = 0
        here: list[tuple[Sequence, int, list[int]]] = []
        for what, number in [("join", 3), *happens]:
            if what == "join":
                limit = 1 + number % 7
                here.append((sequence(shared, number, limit), limit, []))
                with batches.lock:
                    running.take(here[-1][0])
            elif what == "leave":
                here[number % len(here)][0].cancelled.set()
            elif what == "read":
                one, _, read = here[number % len(here)]
                read += tokens_of(one)
            if running._gather():
                running._step(ready) if (ready := [s for s in running._sequences if not s.full]) else None
            else:
                running._over, batches.running[0] = False, running
        for one, _, read in here:  # all read on
            read += tokens_of(one)
        while running._gather():
            running._step([s for s in running._sequences if not s.full])
            for one, _, read in here:
                read += tokens_of(one)
        for one, limit, read in here:
            want = expected(shared, one, limit)
            assert read == want[: len(read)]
            assert one.cancelled.is_set() or read == want
            assert one.left.is_set()


def sequence(engine: BuiltinEngine, number: int, limit: int) -> Sequence:
    prompt = [40 + number] * (1 + 3 * number)
    request = GenerateRequest(prompt="x", temperature=1.0, seed=number)
    processors = engine.decoding.processors(request, len(prompt))
    return Sequence(prompt, limit, engine.decoding.ends, processors, None, engine._batches.way.cache())


def tokens_of(one: Sequence) -> list[int]:
    found = []
    while not one._queue.empty():
        item = one._queue.get()
        assert item is None or isinstance(item, tuple)
        found += [] if item is None else [item[0]]
    return found


_EXPECTED: dict[tuple[int, int], list[int]] = {}


def expected(engine: BuiltinEngine, one: Sequence, limit: int) -> list[int]:
    number = int(one._ids[0, 0]) - 40
    if (number, limit) not in _EXPECTED:
        again = sequence(engine, number, limit)
        engine._batches.join(again, engine.model.slip.default_link)
        _EXPECTED[number, limit] = [item[0] for item in again.tokens() if item is not None]
        again.cancel()
    return _EXPECTED[number, limit]


@pytest.mark.parametrize("moment", range(0, 60, 4))
def test_one_is_cancelled_at_any_moment(engine: BuiltinEngine, moment: int) -> None:
    want = [ask(engine, prompt=word, max_tokens=4).text for word in WORDS[:2]]
    reached, closed = threading.Event(), threading.Event()

    def happens(count: int) -> None:
        if count == moment + 1:
            reached.set()
            closed.wait(0.2)

    link = Through(engine, happens)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(ask, engine, link, prompt=word, max_tokens=4) for word in WORDS[:2]]
        chunks = engine.generate(GenerateRequest(prompt="x" * 50, max_tokens=40), link)
        while not reached.is_set():
            next(chunks)
        chunks.close()
        closed.set()
        assert [o.result().text for o in others] == want


def test_a_slow_reader_holds_up_nobody_else(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "AHEAD", 3)
    want = ask(engine, max_tokens=30)
    link = Through(engine)
    slow = engine.generate(GenerateRequest(prompt="Hello", max_tokens=30), link)
    while not next(slow).completion_tokens:
        pass
    assert ask(engine, link, prompt="Hi", max_tokens=25).tokens == 25
    (running,) = engine._batches.running.values()
    assert running.is_alive() and running._sequences[0]._queue.qsize() == 3
    before = link.count
    time.sleep(0.1)
    assert link.count == before
    rest = gather(slow)
    assert rest.tokens == 30 and want.text.endswith(rest.text)


def test_closing_the_engine_ends_them(tiny_split: Path) -> None:
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0))
    answers = [engine.generate(GenerateRequest(prompt=w, max_tokens=100), Through(engine)) for w in WORDS[:3]]
    for chunks in answers:
        next(chunks)
        next(chunks)
    engine.close()
    assert not threads()
    for chunks in answers:
        with pytest.raises(LinkError, match="shutting down"):
            list(chunks)


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_sequence_that_has_left_is_let_go_of(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    way = engine._batches.way
    cache = way.cache

    def noted() -> Any:
        made = cache()
        caches.append(weakref.ref(made))
        return made

    monkeypatch.setattr(way, "cache", noted)
    link = Through(engine)
    running = engine.generate(GenerateRequest(prompt="Hello", max_tokens=100), link)
    next(running)
    next(running)
    ask(engine, link)
    gc.collect()
    assert caches[0]() is not None and caches[1]() is None
    running.close()
    del running
    gc.collect()
    assert caches[0]() is None


@pytest.mark.slow
def test_memory_is_flat_after_a_thousand_requests(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that one answer keeps: the allocator has some memory for each, and gives it to later ones."""
    monkeypatch.setattr(answer, "AHEAD", 3)
    waiting = engine.generate(GenerateRequest(prompt="Hello", max_tokens=100), engine.model.slip.default_link)
    next(waiting)
    next(waiting)  # begun

    def many(count: int) -> float:
        generator = random.Random(1)
        with ThreadPoolExecutor(8) as pool:
            assert all(got.tokens for got in pool.map(lambda what: ask(engine, **what), requests(generator, count)))
        gc.collect()
        return memory(os.getpid())["now"]

    first = many(200)
    assert many(1000) < first + (8 << 20)
    waiting.close()
