"""Log-probabilities and penalties: against the model's own logits, and only where the owner allows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from loading import attached

from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.decoding import Decoding
from sliplm.engine.logprobs import NEGLIGIBLE, Logprobs, Scores
from sliplm.errors import RequestError
from sliplm.protocol.messages import Chunk, GenerateRequest, decode_chunk, decode_request, encode


@pytest.fixture(scope="module")
def engine(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0, allow_logprobs=True))


def ask(engine: BuiltinEngine, **what: Any) -> list[Chunk]:
    request = GenerateRequest(**{"prompt": "Hello", "max_tokens": 12, **what})
    return list(engine.generate(request, engine.model.slip.default_link))


def test_they_are_the_models_own(engine: BuiltinEngine, tiny: Path) -> None:
    """Of a draw at another temperature, which they do not depend on."""
    chunks = ask(engine, logprobs=3, temperature=2.0, seed=5, top_k=9)
    got = [entry for chunk in chunks for entry in chunk.logprobs]
    assert 1 < len(got) <= chunks[-1].completion_tokens
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = engine.tokenizer
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    for entry in got:
        with torch.no_grad():
            row = original(ids).logits[0, -1].log_softmax(-1)
        values, best = row.topk(3)
        assert [t for t, _ in entry.top] == [tokenizer.decode([i]) for i in best.tolist()]
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
        # a part of a character decodes to U+FFFD whatever it is, so the token is found by its probability
        near = (row - entry.logprob).abs() < 1e-3
        token = next(i for i in near.nonzero().flatten().tolist() if tokenizer.decode([i]) == entry.token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_each_comes_with_its_text(engine: BuiltinEngine) -> None:
    plain = "".join(c.text for c in ask(engine, max_tokens=20))
    for stop in ([], [plain[6:9]], [plain[-1] + "never"]):
        chunks = ask(engine, max_tokens=20, logprobs=0, stop=stop)
        tokens = [e.token for c in chunks for e in c.logprobs]
        text = "".join(c.text for c in chunks)
        assert text and all(e.top == [] for c in chunks for e in c.logprobs)
        if "\ufffd" not in "".join(tokens):
            assert "".join(tokens).startswith(text)
    assert not any(c.logprobs for c in ask(engine))


def test_held_back_until_the_text_is_sent() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join("\ufffd" if i > 99 else chr(96 + i) for i in ids)

    waiting = Logprobs(Letters(), 1, silent={0})
    scored = (-0.5, [(2, -0.5)])
    waiting.push(2, scored, 1)  # "b"
    waiting.push(100, scored, 1)  # half of a character
    waiting.push(101, scored, 2)  # the other half
    waiting.push(0, scored, 2)  # the end token
    assert [e.token for e in waiting.before(1)] == ["b"]
    assert [e.token for e in waiting.before(2)] == ["\ufffd", "\ufffd"]
    assert waiting.before(9) == []


def test_an_impossible_token_has_a_number() -> None:
    scores = Scores(2)
    row = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert scores(torch.empty(0), row) is row
    assert scores.of(1)[0] == NEGLIGIBLE and scores.of(0)[0] == pytest.approx(-0.6931, abs=1e-4)
    assert {i for i, _ in scores.of(0)[1]} == {0, 2}


def test_the_owner_has_to_allow_them(tiny_split: Path) -> None:
    closed = attached(BuiltinEngine(tiny_split / "trusted", stock=0))
    for count in (0, 5):
        with pytest.raises(RequestError, match="owner"):
            ask(closed, logprobs=count)
    assert ask(closed)[-1].finish_reason


def test_penalties_lower_what_was_said(engine: BuiltinEngine) -> None:
    request = GenerateRequest(prompt="x", frequency_penalty=0.5, presence_penalty=1.0)
    decoding = Decoding(transformers.GenerationConfig(), ends=[], vocabulary=5)
    (penalise,) = decoding.processors(request, prompt_tokens=2)
    ids = torch.tensor([[3, 3, 1, 1, 2]])  # the first two are the prompt's
    assert penalise(ids, torch.zeros(1, 5)).tolist() == [[0.0, -2.0, -1.5, 0.0, 0.0]]
    assert not decoding.processors(GenerateRequest(prompt="x"), 2)

    def repeats(**what: Any) -> int:
        entries = [e.token for c in ask(engine, max_tokens=60, logprobs=0, **what) for e in c.logprobs]
        return len(entries) - len(set(entries))

    assert repeats(frequency_penalty=2.0, presence_penalty=2.0) < repeats()


def test_they_survive_the_wire() -> None:
    request = GenerateRequest(prompt="x", logprobs=0, presence_penalty=-1)
    assert decode_request(encode(request)) == request
    data = b'{"text":"a","logprobs":[{"token":"a","logprob":-0.5,"top":[["a",-0.5]]}]}'
    assert encode(decode_chunk(data)) == data
    assert repr(decode_chunk(data).logprobs) == "[TokenLogprob(1 alternatives)]"  # no text


@pytest.mark.parametrize("wrong", [{"logprobs": 21}, {"logprobs": -1}, {"frequency_penalty": 2.5}])
def test_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        decode_request(msgspec.json.encode({"prompt": "x", **wrong}))
