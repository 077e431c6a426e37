"""Faults among answers that are generated together: each ends those whom it concerns, and no others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import Through, ask, threads
from loading import attached

from sliplm.engine import answer
from sliplm.engine.builtin import BuiltinEngine
from sliplm.errors import LinkError, NumericsError, RequestError, SlipError, VerificationError
from sliplm.exchange.link import Link
from sliplm.protocol.messages import GenerateRequest


@pytest.fixture(scope="module")
def shared(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0, allow_logprobs=True))


@pytest.fixture
def engine(shared: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[BuiltinEngine]:
    monkeypatch.setattr(answer, "BEAT_SECONDS", 0.02)
    yield shared
    assert not threads() and not shared._batches.running


def errors(engine: BuiltinEngine, link: Link, asked: list[dict[str, Any]]) -> list[Any]:
    """Asked together: what each raises, or None."""
    gate = threading.Barrier(len(asked))

    def one(what: dict[str, Any]) -> Any:
        gate.wait(10)
        try:
            ask(engine, link, **what)
        except SlipError as error:
            return error
        return None

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


LONG = {"max_tokens": 30}


@pytest.mark.parametrize("after", [1, 12, 60])
def test_a_lost_edge_ends_all_over_it(engine: BuiltinEngine, after: int) -> None:
    def happens(count: int) -> None:
        if count >= after:
            raise LinkError("the edge went away")

    found = errors(engine, Through(engine, happens), [LONG] * 3)
    assert all(type(e) is LinkError and str(e) == "the edge went away" for e in found)
    assert len({id(e) for e in found}) == 3  # raised in a thread each
    assert ask(engine).tokens == 12


def test_a_lie_ends_all_and_each_tells_it(engine: BuiltinEngine) -> None:
    class Lying(Through):
        def exchange(self, group: int, x: Any, own: Any) -> Any:
            product, mine = super().exchange(group, x, own)
            if self.count > 40:
                product[-1, 0] ^= 1
            return product, mine

    found = errors(engine, Lying(engine), [LONG] * 3)
    assert all(type(e) is VerificationError for e in found)


def test_a_number_that_is_none_ends_only_its_own(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = ask(engine, **LONG)
    byte = next(c for c in "~^#@<>" if c not in want.text)
    (bad,) = engine.tokenizer(byte)["input_ids"]
    embedding = engine.model.get_input_embeddings()
    spoiled = embedding._table.clone()
    spoiled[bad] = torch.nan
    monkeypatch.setattr(embedding, "_table", spoiled)
    found = errors(engine, Through(engine), [LONG, {**LONG, "prompt": f"ab{byte}c"}, LONG])
    assert [type(e) for e in found] == [type(None), NumericsError, type(None)]
    assert ask(engine, **LONG) == want


def test_an_unknown_fault_ends_those_whom_it_concerns(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    way = engine._batches.way
    forward = way.forward

    def faulty(parts: Any) -> Any:
        if any(part.start == 9 for part in parts):  # only one comes so far
            raise ZeroDivisionError("secret")
        return forward(parts)

    monkeypatch.setattr(way, "forward", faulty)
    found = errors(engine, Through(engine), [{"max_tokens": 3}, LONG, {"max_tokens": 2}])
    assert found[0] is found[2] is None
    assert "ZeroDivisionError in test_batch_faults.py" in str(found[1]) and "secret" not in caplog.text + str(found[1])


def test_what_a_processor_refuses_ends_only_its_own(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    processors = engine.decoding.processors

    def refusing(request: GenerateRequest, prompt_tokens: int, constraint: Any = None) -> Any:
        def refuse(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if request.max_tokens == 29 and ids.shape[1] > 9:
                raise RequestError("no token is left.")
            return scores

        made = processors(request, prompt_tokens, constraint)
        made.append(refuse)
        return made

    monkeypatch.setattr(engine.decoding, "processors", refusing)
    found = errors(engine, Through(engine), [LONG, {"max_tokens": 29}, LONG])
    assert [type(e) for e in found] == [type(None), RequestError, type(None)]


# --- what stays behind -------------------------------------------------------------------------------------------
