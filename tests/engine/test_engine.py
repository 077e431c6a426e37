"""The engine under load and under fault: what it refuses, what it serialises, and what it keeps to itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
from loading import attached

from sliplm.engine import answer as answer_module
from sliplm.engine import builtin as engine_module
from sliplm.engine.answer import cancellable
from sliplm.engine.builtin import DEFAULT_CONTEXT, BuiltinEngine, _context, _keeps_positions
from sliplm.engine.template import Chat
from sliplm.errors import LinkError, RequestError, SlipError, TooLongError, VerificationError
from sliplm.exchange.link import Link
from sliplm.protocol.messages import MAX_TOKENS, Chunk, GenerateRequest, Message


@pytest.fixture(scope="module")
def shared(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0))


@pytest.fixture(params=["together", "alone"])
def engine(request: pytest.FixtureRequest, shared: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> BuiltinEngine:
    """As it is, and as with a model that computes one answer at a time."""
    if request.param == "alone":
        monkeypatch.setattr(shared, "_batches", None)
    monkeypatch.setattr(answer_module, "BEAT_SECONDS", 0.02)
    return shared


class Slow(Link):
    """Waits at every exchange until `go` is set."""

    def __init__(self, link: Link) -> None:
        self.link, self.count, self.go = link, 0, threading.Event()
        self.party = link.party

    def exchange(self, group: int, x: Any, own: Any) -> Any:
        self.count += 1
        self.go.wait(0.1)
        return self.link.exchange(group, x, own)

    def close(self) -> None: ...


def request(**what: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "Hello", "max_tokens": 3, **what})


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "generate"]


def test_it_can_be_cancelled_before_the_first_token(engine: BuiltinEngine) -> None:
    link = Slow(engine.model.slip.default_link)
    chunks = engine.generate(request(), link)
    prompt = next(chunks)
    assert next(chunks) == prompt and not prompt.text and link.count < 9  # a token takes 9 exchanges
    chunks.close()
    assert link.count < 9 and not threads()


def test_a_long_prompt_is_cancelled_between_its_parts(engine: BuiltinEngine) -> None:
    link, cancelled, sent = engine.model.slip.default_link, threading.Event(), list[int]()
    link = cancellable(link, cancelled.is_set)
    x = np.ones((2, engine.model.slip.shapes[0][1]), np.uint32)
    answers = link.exchanges(0, iter([x] * 9), lambda: sent.append(0))
    next(answers)
    cancelled.set()
    with pytest.raises(LinkError, match="cancelled"):
        next(answers)
    assert sent == [0]
    link = cancellable(engine.model.slip.default_link, threading.Event().is_set)
    assert len(list(link.exchanges(0, iter([x] * 9), lambda: None))) == 9


def running_ahead(engine: BuiltinEngine, tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Slow, Any, set[Any]]:
    """A fast link, a generation of 40 tokens over it that has begun, and the threads that there were before."""
    monkeypatch.setattr(answer_module, "AHEAD", tokens)
    link = Slow(engine.model.slip.default_link)
    link.go.set()
    before = set(threads())
    chunks = engine.generate(request(max_tokens=40), link)
    next(chunks)
    return link, chunks, before


def test_a_slow_reader_holds_the_generation_up(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    link, chunks, before = running_ahead(engine, 3, monkeypatch)
    while not next(chunks).completion_tokens:
        pass
    time.sleep(1.0)
    assert link.count <= 9 * 6  # the prompt; tokens read, waiting and at hand
    rest = list(chunks)
    assert rest[-1].finish_reason and rest[-1].completion_tokens == 40
    assert link.count >= 9 * (40 - rest[-1].accepted_tokens)
    assert set(threads()) <= before


def test_a_reader_that_leaves_sets_a_held_up_generation_free(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, chunks, before = running_ahead(engine, 1, monkeypatch)
    next(chunks)
    time.sleep(0.3)
    chunks.close()
    assert set(threads()) <= before and link.count < 9 * 10


class Lying(Slow):
    """Tells the truth `honest` times, then waits for `go`, and lies."""

    def __init__(self, link: Link, honest: int) -> None:
        super().__init__(link)
        self.honest, self.asked = honest, threading.Event()

    def exchange(self, group: int, x: Any, own: Any) -> Any:
        self.count += 1
        answer, mine = self.link.exchange(group, x, own)
        if self.count > self.honest:
            self.asked.set()
            self.go.wait(10)
            answer[0, 0] ^= 1
        return answer, mine


@pytest.mark.parametrize("honest", [0, 9 * 3])
def test_a_lie_counts_after_the_reader_has_gone(engine: BuiltinEngine, honest: int) -> None:
    link = Lying(engine.model.slip.default_link, honest)
    chunks = engine.generate(request(max_tokens=40), link)
    next(chunks)
    assert next(chunks).finish_reason is None and link.asked.wait(10)
    threading.Timer(0.2, link.go.set).start()
    with pytest.raises(VerificationError):
        chunks.close()
    assert not threads()


def test_a_lie_counts_behind_a_stop_text(engine: BuiltinEngine) -> None:
    link = engine.model.slip.default_link
    two = "".join(c.text for c in engine.generate(request(prompt="xyz", max_tokens=2), link))
    assert two
    link = Lying(link, 9 * 2)
    link.go.set()
    with pytest.raises(VerificationError):
        for chunk in engine.generate(request(prompt="xyz", max_tokens=40, stop=[two]), link):
            assert chunk.finish_reason is None
            if chunk.completion_tokens == 1:
                assert link.asked.wait(10)  # ahead of the reader, who is to stop at the second token


def test_every_chunk_has_the_counts_so_far(engine: BuiltinEngine) -> None:
    chunks = list(engine.generate(request(prompt="abc", max_tokens=4), engine.model.slip.default_link))
    assert chunks[0] == Chunk("", None, 3) and {c.prompt_tokens for c in chunks} == {3}
    counts = [c.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 4


def test_an_unexpected_failure_says_where_and_not_what(
    engine: BuiltinEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    class Broken(Slow):
        def exchange(self, group: int, x: Any, own: Any) -> Any:
            raise ZeroDivisionError("secret")

    caplog.set_level(logging.DEBUG, logger="sliplm")
    with pytest.raises(SlipError, match=r"ZeroDivisionError in test_engine\.py") as caught:
        list(engine.generate(request(), Broken(engine.model.slip.default_link)))
    time.sleep(0.05)
    shown = caplog.text + "".join(capfd.readouterr()) + str(caught.value)
    assert "secret" not in shown and "Traceback" not in shown and "the generation failed: Zero" in caplog.text


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ raise_exception('roles must alternate') }}", "(roles must alternate)"),
        ("{{ messages[0].content.nothing.here }}", "these messages."),
        ("{% include 'secret' %}", "these messages."),
        ("{{ 1 / 0 }}", "these messages."),
    ],
)
def test_a_template_speaks_for_itself_only_on_purpose(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, template: str, shown: str
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with pytest.raises(RequestError) as caught:
        engine._prompt(GenerateRequest(messages=[Message("user", "Hi")]))
    assert shown in str(caught.value)
    assert issubclass(jinja2.UndefinedError, jinja2.TemplateError)  # why the exact type is compared


def test_a_model_without_a_limit_gets_one() -> None:
    def tokenizer(known: float) -> Any:
        return SimpleNamespace(model_max_length=known)

    assert _context(SimpleNamespace(max_position_embeddings=128), tokenizer(7)) == 128
    assert _context(SimpleNamespace(), tokenizer(2048)) == 2048
    assert _context(SimpleNamespace(max_position_embeddings=None), tokenizer(int(1e30))) == DEFAULT_CONTEXT


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"prompt": "x" * 10, "max_tokens": 5}, r"15 tokens \(10 in the prompt, 5 in the completion\)"),
        ({"prompt": "x" * 12, "max_tokens": MAX_TOKENS}, r"13 tokens \(12 in the prompt, 1 in the completion\)"),
        ({"messages": [Message("user", "x")], "max_tokens": 5}, r"20 tokens \(15 in the messages, 5 in"),
    ],
)
def test_too_long_prompts_are_refused_in_openais_words(
    shared: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(shared, "_room", 10)
    with pytest.raises(TooLongError, match=rf"maximum context length is 10 tokens\. However, you requested {says}"):
        list(shared.generate(GenerateRequest(**what), shared.model.slip.default_link))


@pytest.mark.parametrize(
    ("rope", "alone"),
    [
        ({"rope_type": "default"}, False),
        ({"rope_type": "llama3", "factor": 8.0}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
    ],
)
def test_models_that_adapt_their_positions_generate_one_at_a_time(rope: dict[str, Any], alone: bool) -> None:
    assert _keeps_positions({"text_config": {"rope_parameters": rope}}) == alone


def test_a_dynamic_rope_leaves_one_slot(tmp_path: Path) -> None:
    from tiny import save_tiny

    from sliplm.split.model import Options, split_model

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    split_model(str(save_tiny(tmp_path / "model", rope_parameters=rope)), tmp_path / "bundle", Options(rank=4))
    one_at_a_time = attached(BuiltinEngine(tmp_path / "bundle" / "trusted", stock=0))
    assert one_at_a_time.capacity == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 0.0099])
def test_temperatures_that_would_divide_by_nothing(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"0 \(greedy\) or at least 0\.01"):
        GenerateRequest(prompt="x", temperature=temperature)


def test_tokens_that_the_model_does_not_have(tiny_split: Path) -> None:
    """Tokenizers with more tokens than the model has embeddings."""
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0))
    engine.tokenizer.add_tokens(["<extra>"])
    for what in ({"prompt": "Hello<extra>"}, {"prompt": None, "messages": [Message("user", "<extra>")]}):
        with pytest.raises(RequestError, match=r"the token <extra> in the prompt is none of this model's"):
            list(engine.generate(request(**what), engine.model.slip.default_link))
    engine.tokenizer.chat_template += "<extra>"
    engine.chat = Chat(engine.tokenizer, engine._vocabulary)
    assert engine.chat.refusal == "its chat template writes the token <extra>, which the model does not have"
    with pytest.raises(RequestError, match="takes no chats"):
        list(engine.generate(request(prompt=None, messages=[Message("user", "Hi")]), engine.model.slip.default_link))
    assert list(engine.generate(request(), engine.model.slip.default_link))[-1].finish_reason


def test_whatever_else_a_tokenizer_returns_the_model_gets_tokens(tiny_split: Path) -> None:
    engine = attached(BuiltinEngine(tiny_split / "trusted", stock=0))
    engine.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in engine.tokenizer("Hello")
    for what in ({}, {"prompt": None, "messages": [Message("user", "Hi")]}):
        assert list(engine.generate(request(**what), engine.model.slip.default_link))[-1].finish_reason


@pytest.mark.parametrize("refused", [False, True])
def test_what_the_first_requests_need_is_made_once(
    tiny_split: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    engine, makes = attached(BuiltinEngine(tiny_split / "trusted", stock=0)), list[str]()

    def make(what: str, sentence: str) -> Any:
        makes.append(what)
        time.sleep(0.1)
        if refused:
            raise RequestError(sentence)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(engine_module, "Grammars", lambda *_: make("grammars", "no schemas here."))
    monkeypatch.setattr(engine_module, "find_syntax", lambda *_: make("syntax", "no tools here."))

    def ask(use: Callable[[], object]) -> str:
        try:
            return str(use() and "made")
        except RequestError as error:
            return str(error)

    for use, sentence in ((engine._grammars, "no schemas here."), (lambda: engine.syntax, "no tools here.")):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, [use] * 8)) == {sentence if refused else "made"}
        assert ask(use) == (sentence if refused else "made")
    assert makes == ["grammars", "syntax"]
    engine.close()
