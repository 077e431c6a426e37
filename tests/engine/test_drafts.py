"""Guesses of the next tokens: whatever they are, the answer is the one without them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from answers import alone, ask, assert_same, at_once, requests
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loading import attached
from tiny import save_tiny

from sliplm.engine import answer
from sliplm.engine.batch import GUESSES, Batches
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.drafting import Drafting, DraftModel
from sliplm.engine.drafts import LENGTHS, MODEL, PAD, Drafts, Lookup, Pace
from sliplm.engine.sequence import Sequence
from sliplm.errors import NumericsError, SlipError
from sliplm.protocol.messages import GenerateRequest
from sliplm.split.model import Options, split_model

TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS, st.integers(1, 12))
def test_a_lookup_finds_what_followed_the_longest_repetition_the_last_time(text: list[int], most: int) -> None:
    lookup = Lookup()
    for token in text:
        lookup.extend([token])
    ends = ((n, i) for n in LENGTHS for i in range(len(text) - 1, n - 1, -1) if text[i - n : i] == text[-n:])
    length, start = next(ends, (0, 0))
    want, whole = [], list(text)
    while length and len(want) < most:  # the text goes on as it did there, and may run into what it has just said
        want.append(whole[start + len(want)])
        whole.append(want[-1])
    assert lookup.repetition() == length and lookup.guess(most) == want


@given(st.lists(st.tuples(st.integers(0, 10), st.floats(0, 1)), max_size=60), st.floats(0, 1.5))
def test_a_draft_is_as_long_as_its_last_token_is_worth_its_price(
    history: list[tuple[int, float]], price: float
) -> None:
    drafts = Drafts([1, 2, 3, 4, 5] * 3)
    for most, right in history:
        proposed = drafts.propose(most, 0.0)
        drafts.learn(len(proposed), int(right * len(proposed)))
    chance = drafts.chance(4)
    assert 0 < chance < 1
    proposed = drafts.propose(10, price)
    for count in range(1, 11):
        if abs(chance**count - price - PAD) > 1e-9:
            assert (len(proposed) >= count) == (chance**count > price + PAD)
    assert proposed == ([1, 2, 3, 4, 5] * 2)[: len(proposed)]


def test_what_is_always_wrong_is_hardly_guessed_and_what_becomes_right_is_guessed_again() -> None:
    drafts = Drafts([1, 2, 3, 4] * 4)
    counts = []
    for _ in range(400):
        counts.append(len(drafts.propose(10, 0.1)))
        drafts.learn(counts[-1], 0)
    assert 0 < sum(counts[200:]) < 30 and drafts.rejected == sum(counts)
    for _ in range(400):
        count = len(drafts.propose(10, 0.1))
        drafts.learn(count, count)
    assert len(drafts.propose(10, 0.1)) == 10


@given(st.lists(st.tuples(st.integers(1, 128), st.floats(0.5, 1.4)), min_size=1, max_size=50))
def test_the_pace_is_the_line_that_fits_best(passes: list[tuple[int, float]]) -> None:
    """Against weighted least squares in float64, with what is supposed of the slope. None of these takes very long."""
    pace = Pace()
    for rows, seconds in passes:
        pace.learn(rows, seconds)
    weights = Pace.KEPT ** np.arange(len(passes))[::-1]
    rows, seconds = np.array(passes, np.float64).T
    mean_rows, mean = np.average(rows, weights=weights), np.average(seconds, weights=weights)
    both, spread = (weights * (rows - mean_rows) @ away for away in (seconds - mean, rows - mean_rows))
    slope = (both + Pace.PRIOR * Pace.SLOPE * mean) / (spread + Pace.PRIOR)
    slope = max(0.0, min(slope, mean / (1 / Pace.STEEPEST + mean_rows - 1)))
    for count in (1, 16):
        line = max(0.0, mean + (count - mean_rows) * slope)
        assert pace.price(count) == pytest.approx(min(1.0, count * slope / max(line, 1e-12)), rel=1e-6, abs=1e-9)
    assert pace.seconds == pytest.approx(mean)


def test_rows_are_cheap_where_the_round_trip_is_long_and_dear_where_arithmetic_is_all() -> None:
    far, near = Pace(), Pace()
    for rows in (1, 3, 9, 2, 5) * 8:
        far.learn(rows, 2.4 + 0.003 * rows)
        near.learn(rows, 0.001 + 0.02 * rows)
    assert far.price(1) < 0.02 and far.price(16) < 0.15
    assert near.price(1) == pytest.approx(Pace.STEEPEST) and near.price(16) > 0.8


# --- in the engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0, allow_logprobs=True))


@pytest.fixture
def eager(shared: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> BuiltinEngine:
    """One that guesses as much as it can."""
    monkeypatch.setattr(answer, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(Pace, "price", lambda self, sequences: -PAD + 1e-9)
    return shared


class Oracle:
    """Guesses what it is told to: tokens of the answer, some of them changed."""

    def __init__(self, prompt: list[int], text: list[int], wrong: set[int]) -> None:
        self._text = [(token + (i in wrong)) % 257 for i, token in enumerate(text)]
        self._count, self._prompt = 0, len(prompt)

    def extend(self, tokens: Iterable[int]) -> None:
        self._count += len(list(tokens))

    def guess(self, most: int) -> list[int]:
        at = self._count - self._prompt
        return self._text[at : at + most]


def run(engine: BuiltinEngine, prompt: list[int], seed: int, drafts: Drafts | None, limit: int = 24) -> Sequence:
    request = GenerateRequest(prompt="x", temperature=1.0, seed=seed, frequency_penalty=0.5)
    processors = engine.decoding.processors(request, len(prompt))
    cache = engine._batches.way.cache()
    return Sequence(prompt, limit, engine.decoding.ends, processors, None, cache, drafts)


def answers(engine: BuiltinEngine, sequences: list[Sequence]) -> tuple[list[list[int]], list[int]]:
    """Their tokens, and how many of each had been guessed."""
    for one in sequences:
        engine._batches.join(one, engine.model.slip.default_link)
    tokens = [[token for token in one.tokens() if token is not None] for one in sequences]
    for one in sequences:
        one.cancel()
    return [[t.id for t in some] for some in tokens], [sum(t.guessed for t in some) for some in tokens]


@given(st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 23))), min_size=1, max_size=4))
@example([(0, {11})])
@settings(max_examples=25, deadline=None)
def test_whatever_is_guessed_the_answer_is_the_same(shared: BuiltinEngine, some: list[tuple[int, set[int]]]) -> None:
    """Also where tokens are drawn: the seed's numbers are used one a token, as without guesses."""
    prompts = [[40 + seed, 41, 42, 43] for seed, _ in some]
    want, none = answers(shared, [run(shared, p, seed, None) for p, (seed, _) in zip(prompts, some, strict=True)])
    assert not any(none)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "price", lambda self, sequences: -PAD + 1e-9)
        patch.setattr(Drafts, "chance", lambda self, kind: 0.9 if kind == MODEL else 0.0)
        guided = [
            run(shared, p, seed, Drafts(p, Oracle(p, text, wrong)))
            for p, (seed, wrong), text in zip(prompts, some, want, strict=True)
        ]
        got, guessed = answers(shared, guided)
    assert got == want
    for one, count, text, (_, wrong) in zip(guided, guessed, want, some, strict=True):
        # The first token is the prompt's, the last one is not worth a guess, and each wrong guess costs a pass.
        assert count >= len(text) - 2 - len(wrong) - len(text) // (1 + GUESSES)
        at, met = 1, False  # what comes after a whole draft is nobody's guess
        while at < len(text) - 1 and not met:
            met = bool(wrong & set(range(at, min(at + GUESSES, len(text) - 1))))
            at += GUESSES + 1
        assert bool(one.rejected) == met or wrong & {len(text) - 1}


def test_requests_of_all_kinds_are_answered_alike(eager: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(11)
    asked = requests(generator, 24)
    got = at_once(eager, asked, generator)
    assert_same(got, alone(eager, monkeypatch, asked), 1e-3)


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}


@pytest.mark.slow  # the schema is tried in a process of its own
def test_a_schema_holds_and_never_sees_a_wrong_guess(eager: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"prompt": '{"a": "xy"} {"a": "xy"} {', "max_tokens": 30, "schema": SCHEMA, "seed": 5}]
    assert_same([ask(eager, **asked[0])], alone(eager, monkeypatch, asked), 1e-3)


def test_an_answer_says_what_was_guessed(eager: BuiltinEngine) -> None:
    request = GenerateRequest(prompt="the dog " * 8, max_tokens=40, temperature=0)
    *_, last = eager.generate(request, eager.model.slip.default_link)
    assert last.completion_tokens == 40 and 0 < last.accepted_tokens < 40
    stopped = GenerateRequest(prompt="the dog " * 8, max_tokens=40, temperature=0, stop=[text_of(eager, request)[8:10]])
    *_, last = eager.generate(stopped, eager.model.slip.default_link)
    assert last.finish_reason == "stop" and last.accepted_tokens <= last.completion_tokens


def text_of(engine: BuiltinEngine, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in engine.generate(request, engine.model.slip.default_link))


def test_a_guess_that_the_model_cannot_compute_costs_no_answer(
    eager: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some rows may not be finite: the answer's own are asked for again without it."""
    asked = {"prompt": "the dog " * 8, "max_tokens": 20, "temperature": 0}
    want, way, failed = ask(eager, **asked), eager._batches.way, []

    def faulty(parts: Any) -> torch.Tensor:
        if any(part.wanted > 1 for part in parts):
            failed.append(parts)
            raise NumericsError("not finite")
        return type(way).forward(way, parts)

    monkeypatch.setattr(way, "forward", faulty)
    assert ask(eager, **asked) == want and failed


def test_nobody_guesses_if_the_owner_says_so(tiny_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "price", lambda self, sequences: -PAD + 1e-9)
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0, drafts="none"))
    *_, last = engine.generate(GenerateRequest(prompt="the dog " * 8, max_tokens=20), engine.model.slip.default_link)
    assert last.accepted_tokens == last.rejected_tokens == 0


# --- draft models -------------------------------------------------------------------------------------------


def test_a_model_that_is_the_original_guesses_all(
    tiny: Path, tiny_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "price", lambda self, sequences: -PAD + 1e-9)
    monkeypatch.setattr(Drafts, "chance", lambda self, kind: 0.9 if kind == MODEL else 0.0)
    plain = attached(BuiltinEngine(tiny_split / "trusted", stock=0, drafts="none"))
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0, drafts=f"model:{tiny}"))
    request = GenerateRequest(prompt="Hello", max_tokens=45, temperature=0)
    assert text_of(engine, request) == text_of(plain, request)
    *_, last = engine.generate(request, engine.model.slip.default_link)
    assert last.rejected_tokens <= 10 and last.completion_tokens - last.accepted_tokens <= 6
    assert engine._batches.drafting.seconds > 0


@given(st.lists(st.tuples(st.lists(st.integers(5, 250), min_size=1, max_size=9), st.integers(1, 5)), max_size=8))
@settings(max_examples=20, deadline=None)
def test_a_draft_model_goes_on_with_the_text_as_it_is(tiny: Path, steps: list[tuple[list[int], int]]) -> None:
    """Guesses that the text did not take are forgotten."""
    drafter, original = drafters(tiny)
    source, text = drafter.text(), [5]
    source.extend([5])
    with torch.inference_mode():
        for tokens, most in steps:
            source.extend(tokens)
            text += tokens
            whole = list(text)
            for token in source.guess(most):
                logits = original(torch.tensor([whole])).logits[0, -1]
                assert float(logits.max() - logits[token]) < 1e-3 * float(logits.std())
                whole.append(token)


def test_a_draft_model_of_no_use_is_said(
    tiny: Path, tiny_split: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sliplm.engine.builtin.find_way", lambda model: None)
    BuiltinEngine(tiny_split / "trusted", stock=0)
    assert "of no use" not in caplog.text
    BuiltinEngine(tiny_split / "trusted", stock=0, drafts=f"model:{tiny}")
    assert "of no use" in caplog.text


def test_a_text_that_is_too_long_for_a_draft_model_has_no_guesses(tiny: Path) -> None:
    drafter, _ = drafters(tiny)
    source = drafter.text()
    source.extend([7] * 120)  # of 128 positions
    with torch.inference_mode():
        assert len(source.guess(8)) == 8 and source.guess(9) == []


_LOADED: dict[Path, tuple[DraftModel, Any]] = {}


def drafters(path: Path) -> tuple[DraftModel, Any]:
    if path not in _LOADED:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        _LOADED[path] = DraftModel(str(path), tokenizer, model.config.vocab_size), model
    return _LOADED[path]


def test_what_guesses_nothing_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)

    def refusal(kind: str) -> str:
        with pytest.raises(SlipError) as caught:
            Drafting(kind, tokenizer, 300)
        return str(caught.value)

    assert "write lookup, none or model:DIR" in refusal("sometimes")
    assert "no directory" in refusal(f"model:{tmp_path / 'nowhere'}")
    assert "cannot be loaded" in refusal(f"model:{tmp_path}")
    other = save_tiny(tmp_path / "other")
    changed = transformers.AutoTokenizer.from_pretrained(other)
    changed.add_tokens(["<another>"])
    changed.save_pretrained(other)
    assert "other tokens" in refusal(f"model:{other}")


# --- models of other layouts, and open blocks ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["first:2", "trusted:2", "last:2"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltinEngine]:
    place = tmp_path_factory.mktemp("opened")
    model = save_tiny(place / "model", num_hidden_layers=4)
    split_model(str(model), place / "split", Options(rank=4, plan=request.param))
    yield attached(BuiltinEngine(place / "split" / "trusted", stock=0, allow_logprobs=True))


def test_open_blocks_forget_wrong_guesses(opened: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge has their cache."""
    monkeypatch.setattr(Pace, "price", lambda self, sequences: -PAD + 1e-9)
    assert isinstance(opened._batches, Batches)
    asked = requests(random.Random(3), 12)
    asked += [{"prompt": "the dog " * 12, "max_tokens": 40, "temperature": 0}]
    got = [ask(opened, **what) for what in asked]
    assert_same(got, alone(opened, monkeypatch, asked), 1e-3)
    assert not opened.model.slip.default_link._blocks.requests
    request = GenerateRequest(prompt="the dog " * 12, max_tokens=40, temperature=0)
    *_, last = opened.generate(request, opened.model.slip.default_link)
    assert last.accepted_tokens + last.rejected_tokens > 0


# --- where guessing goes wrong ------------------------------------------------------------------------------


class Broken(Oracle):
    """Its code fails, as a draft model's does beyond the last of its positions."""

    def guess(self, most: int) -> list[int]:
        raise IndexError("index out of range in self")


def test_who_cannot_guess_any_more_ends_no_answer(eager: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafts, "chance", lambda self, kind: 0.9 if kind == MODEL else 0.0)
    prompts = [[40 + seed, 41, 42, 43] for seed in range(6)]
    want, _ = answers(eager, [run(eager, p, seed, None) for seed, p in enumerate(prompts)])
    some = [run(eager, p, i, Drafts(p, Broken(p, [], set())) if i % 2 else None) for i, p in enumerate(prompts)]
    got, guessed = answers(eager, some)
    assert got == want and not any(guessed)


def test_at_the_end_of_an_answer_all_that_was_guessed_in_vain_is_counted() -> None:
    """Whoever reads the end reads the count next, on another thread."""
    counts = []

    class Watched(Sequence):
        def finish(self) -> None:
            counts.append(self.rejected)
            super().finish()

    drafts = Drafts([40, 41], Oracle([40, 41], [8, 7, 8, 8, 8], set()))
    one = Watched([40, 41], 9, [7], transformers.LogitsProcessorList(), None, None, drafts)
    one.seen(one.part(2), torch.eye(10)[[8]])
    part = one.part(9, -PAD + 1e-9)
    assert part.tokens == [8, 7, 8, 8, 8]
    one.seen(part, torch.eye(10)[[7] * part.wanted])  # the first guess is right, and ends the answer
    assert counts == [3]
