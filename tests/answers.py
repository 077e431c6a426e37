"""Answers of an engine: asked for one by one, or many at a time, and compared."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from sliplm.engine.builtin import BuiltinEngine
from sliplm.exchange.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "it"]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "generate"]


class Through(Link):
    """Another link, with something that happens at every exchange."""

    party = None

    def __init__(self, engine: BuiltinEngine, happens: Callable[[int], object] = lambda count: None) -> None:
        self.link, self.happens, self.count = engine.model.slip.default_link, happens, 0

    def exchange(self, group: int, x: Any, own: Any) -> Any:
        self.count += 1
        self.happens(self.count)
        return self.link.exchange(group, x, own)

    def close(self) -> None: ...


@dataclass
class Got:
    """All of an answer, however it was cut into chunks."""

    text: str = ""
    tokens: int = 0
    reason: str | None = None
    logprobs: list[Any] = field(default_factory=list)


def gather(chunks: Iterator[Chunk]) -> Got:
    got = Got()
    for chunk in chunks:
        got.text += chunk.text
        got.tokens, got.reason = chunk.completion_tokens, chunk.finish_reason
        got.logprobs += [(e.token, e.logprob, *e.top) for e in chunk.logprobs]
    return got


def ask(engine: BuiltinEngine, link: Link | None = None, **what: Any) -> Got:
    request = GenerateRequest(**{"prompt": "Hello", "max_tokens": 12, **what})
    return gather(engine.generate(request, link or engine.model.slip.default_link))


def alone(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> list[Got]:
    """What they get one after the other, from Transformers' `generate`."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_batches", None)
        return [ask(engine, **what) for what in asked]


def at_once(engine: BuiltinEngine, asked: list[dict[str, Any]], generator: random.Random) -> list[Got]:
    """In any order, with pauses, 16 at a time."""
    order = generator.sample(range(len(asked)), len(asked))
    pauses = [generator.random() * 0.05 for _ in asked]

    def one(i: int) -> tuple[int, Got]:
        time.sleep(pauses[i])
        return i, ask(engine, **asked[i])

    with ThreadPoolExecutor(16) as pool:
        return [got for _, got in sorted(pool.map(one, order), key=lambda pair: pair[0])]


def assert_same(got: list[Got], want: list[Got], close: float) -> None:
    """But for rounding of the log-probabilities."""
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.text, ours.tokens, ours.reason) == (theirs.text, theirs.tokens, theirs.reason)
        assert [entry[0] for entry in ours.logprobs] == [entry[0] for entry in theirs.logprobs]
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert [mine[1], *(p for _, p in mine[2:])] == pytest.approx(
                [other[1], *(p for _, p in other[2:])], abs=close
            )


def requests(generator: random.Random, count: int) -> list[dict[str, Any]]:
    """Of all kinds."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 0.8, "seed": 4, "top_p": 0.9},
        {"temperature": 1.2, "seed": 5, "top_k": 20, "logprobs": 0},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"stop": ["e", "\n"]},
    ]
    return [
        {
            "prompt": " ".join(generator.choices(WORDS, k=generator.randint(1, 12))),
            "max_tokens": generator.randint(1, 30),
            **kinds[i % len(kinds)],
        }
        for i in range(count)
    ]
