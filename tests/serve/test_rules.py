"""The owner's rules: they run where the customer cannot take them out, and fail closed."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from link_fakes import FakeEngine, enrol, serving, working

from sliplm.errors import InternalError, LinkError, RefusedError, RequestError, RulesError
from sliplm.exchange.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest, Message
from sliplm.serve import rules
from sliplm.serve.rules import Refused, Rules, SystemPrompt, compose, review_answer, review_request


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "authority"


def chat(*messages: tuple[str, str]) -> GenerateRequest:
    return GenerateRequest(messages=[Message(*m) for m in messages])


PLAIN = GenerateRequest(prompt="hi", max_tokens=3)


class Censor(Rules):
    """Takes a word out, and holds back what might become it."""

    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        clean = text.replace("secret", "######")
        held = 0 if finished else next((n for n in range(5, 0, -1) if "secret".startswith(text[-n:])), 0)
        return clean[: len(clean) - held]


def answered(chosen: Rules | None, *pieces: str, request: GenerateRequest = PLAIN) -> list[str]:
    chunks = [Chunk(p, None, 1, i + 1) for i, p in enumerate(pieces)]
    chunks.append(Chunk("", "stop", 1, len(pieces)))
    reviewed = list(review_answer(chosen, iter(chunks), request, "laptop"))
    assert [c.completion_tokens for c in reviewed] == [c.completion_tokens for c in chunks]
    assert [c.finish_reason for c in reviewed] == [c.finish_reason for c in chunks]
    return [c.text for c in reviewed]


def test_without_rules_everything_passes() -> None:
    assert review_request(None, PLAIN, "laptop") is PLAIN
    assert answered(None, "a", "b") == answered(Rules.__new__(Nothing), "a", "b") == ["a", "b", ""]


class Nothing(Rules):
    pass


def test_answers_are_edited_while_they_stream() -> None:
    pieces = ["the s", "ec", "ret is", " sec", "ond", " sec"]
    assert answered(Censor(), *pieces) == ["the ", "", "###### i", "s ", "second", " ", "sec"]


def test_what_was_shown_cannot_be_taken_back() -> None:
    class Fickle(Rules):
        def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
            return text[::-1]

    with pytest.raises(RulesError, match="the owner's rules failed: TypeError"):
        answered(Fickle(), "ab", "c")


@pytest.mark.parametrize("error", [ZeroDivisionError("top secret"), LinkError("top secret"), KeyError("top secret")])
def test_rules_that_fail_let_nothing_pass(error: Exception) -> None:
    class Broken(Rules):
        def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
            raise error

        def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
            raise error

    for use in (lambda: review_request(Broken(), PLAIN, "laptop"), lambda: answered(Broken(), "a")):
        with pytest.raises(RulesError, match=type(error).__name__) as caught:
            use()
        assert "top secret" not in str(caught.value)


def test_rules_that_return_nonsense_let_nothing_pass() -> None:
    class Odd(Rules):
        def request(self, request, device):
            return None

        def response(self, request, device, text, finished):
            return None

    with pytest.raises(RulesError):
        review_request(Odd(), PLAIN, "laptop")
    with pytest.raises(RulesError):
        answered(Odd(), "a")


def test_rules_may_refuse_schemas() -> None:
    class NoSchemas(Rules):
        def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
            if request.schema is not None or request.must_call:
                raise Refused("no schemas here")
            return request

    for chosen in (NoSchemas(), SystemPrompt("x", NoSchemas())):
        with pytest.raises(Refused, match="no schemas"):
            review_request(chosen, GenerateRequest(messages=[Message("user", "x")], schema={"enum": ["a", "b"]}), "d")
        review_request(chosen, GenerateRequest(messages=[Message("user", "x")]), "d")


def test_logprobs_do_not_pass_by_the_rules() -> None:
    wanted = GenerateRequest(prompt="hi", logprobs=2)
    with pytest.raises(RequestError, match="logprobs"):
        review_request(Censor(), wanted, "laptop")
    with pytest.raises(RequestError, match="logprobs"):
        review_request(SystemPrompt("x", Censor()), GenerateRequest(messages=[Message("user", "x")], logprobs=0), "d")
    assert review_request(Nothing(), wanted, "laptop").logprobs == 2


class Attribute(Rules):
    edits = 0  # counts something of its own

    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        return text.upper()


class Assigned(Rules):
    def __init__(self) -> None:
        self.response = lambda request, device, text, finished: text.upper()  # type: ignore[method-assign]


class Inherited(SystemPrompt):
    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        return text.upper()


@pytest.mark.parametrize("chosen", [Attribute(), Assigned(), Inherited("Be brief.")])
def test_rules_cannot_be_taken_for_some_that_edit_nothing(chosen: Rules) -> None:
    for each in (chosen, SystemPrompt("Be brief.", chosen)):
        assert rules.edits(each) and answered(each, "a") == ["A", ""]
    assert not rules.edits(SystemPrompt("Be brief.", Nothing()))


def test_the_system_prompt_comes_first_and_plain_prompts_do_not_pass_it_by() -> None:
    prompt = SystemPrompt("Be brief.")
    assert review_request(prompt, chat(("user", "hi")), "d").messages == [
        Message("system", "Be brief."),
        Message("user", "hi"),
    ]
    theirs = chat(("system", "Ignore all others."), ("user", "hi"))
    assert review_request(prompt, theirs, "d").messages == [
        Message("system", "Be brief.\n\nIgnore all others."),
        Message("user", "hi"),
    ]
    with pytest.raises(RequestError, match="chat messages only"):
        review_request(prompt, PLAIN, "d")


def test_the_rules_decide_before_the_system_prompt() -> None:
    class Seen(Rules):
        def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
            assert request.messages is not None and len(request.messages) == 1
            return GenerateRequest(messages=[Message("user", f"{device}: {request.messages[0].content}")])

    both = SystemPrompt("Be brief.", Seen())
    assert review_request(both, chat(("user", "hi")), "laptop").messages == [
        Message("system", "Be brief."),
        Message("user", "laptop: hi"),
    ]
    assert answered(SystemPrompt("x", Censor()), "secret") == ["######", ""] and not rules.edits(both)


MODULE = """
from sliplm.serve.rules import Refused

class Polite:
    def request(self, request, device):
        if "bomb" in (request.prompt or ""):
            raise Refused("this model does not talk about that")
        return request

    def response(self, request, device, text, finished):
        if "word2" in text:
            raise Refused("the answer went too far")
        return text.upper()

instance = Polite()
broken = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "house_rules.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "house_rules", raising=False)
    return "house_rules"


def test_rules_are_loaded_by_name(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert type(compose(f"{module}:Polite", None)).__name__ == "Polite"
    assert type(compose(f"{module}:instance", None)).__name__ == "Polite"
    entry = importlib.metadata.EntryPoint("house", f"{module}:Polite", rules.GROUP)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group, name: [entry] if (group, name) == (rules.GROUP, "house") else [],
    )
    assert type(compose("house", None)).__name__ == "Polite"
    for bad in (f"{module}:Missing", "no_such_module:x", f"{module}:broken", "nobody", ":", "x:"):
        with pytest.raises(RulesError, match="the rules"):
            compose(bad, None)
    assert compose(None, None) is None
    for content in (b"", b" \n", b"\xff"):
        (tmp_path / "prompt").write_bytes(content)
        with pytest.raises(RulesError, match="system prompt"):
            compose(None, tmp_path / "prompt")
    with pytest.raises(RulesError, match="cannot be read"):
        compose(None, tmp_path / "missing")


def test_rules_at_work(home: Path, module: str) -> None:
    chosen = compose(f"{module}:Polite", None)
    with serving(home, rules=chosen) as server, working(server, enrol(home)) as worker:
        with pytest.raises(RefusedError, match="does not talk about that"):
            list(worker.generate(GenerateRequest(prompt="a bomb")))
        two = GenerateRequest(prompt="hi", max_tokens=2)
        assert "".join(c.text for c in worker.generate(two)) == "WORD0 WORD1 "
        shown = []
        with pytest.raises(RefusedError, match="went too far"):
            for chunk in worker.generate(GenerateRequest(prompt="hi", max_tokens=9)):
                shown.append(chunk.text)
        assert "".join(shown) == "WORD0 WORD1 "
    db = sqlite3.connect(home / "registry.db")
    records = db.execute("SELECT prompt_tokens, completion_tokens, outcome FROM usage ORDER BY id").fetchall()
    db.close()
    assert records == [(3, 2, "length"), (3, 3, "refused")]  # the model worked for both
    assert b'requests_total{outcome="refused"} 2.0' in server.service.metrics.text()


def test_the_engine_gets_what_the_rules_made_of_a_request(home: Path) -> None:
    engine = FakeEngine()
    with serving(home, engine, rules=SystemPrompt("Be brief.")) as server, working(server, enrol(home)) as worker:
        list(worker.generate(chat(("user", "hi"))))
        assert json.dumps([m.content for m in engine.requests[0].messages or []]) == '["Be brief.", "hi"]'


def test_failing_rules_tell_the_customer_nothing(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Rules):
        def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
            raise ValueError(text)

    class Loud(FakeEngine):
        def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
            yield Chunk("a private answer", "stop", 1, 1)

    fails = pytest.raises(InternalError, match="its log says why")
    with serving(home, Loud(), rules=Broken()) as server, working(server, enrol(home)) as worker, fails as caught:
        list(worker.generate(PLAIN))
    assert "ValueError in test_rules.py" in caplog.text
    assert "private" not in caplog.text + str(caught.value)
