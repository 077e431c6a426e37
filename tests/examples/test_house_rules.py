"""The owner's rules of `examples/house_rules.py`, which the documents show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from link_fakes import FakeEngine, enrol, serving, working

from examples.house_rules import HouseRules
from sliplm.exchange.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, Tool, ToolCall
from sliplm.serve.rules import Refused, compose, review_answer, review_request

ROOT = Path(__file__).parents[2]
PLAIN = GenerateRequest(prompt="hi", max_tokens=3)
RULES = HouseRules()


def answered(*pieces: str) -> list[str]:
    chunks = [*(Chunk(piece) for piece in pieces), Chunk("", "stop")]
    return [c.text for c in review_answer(RULES, iter(chunks), PLAIN, "laptop")]


def test_the_docs_show_this_file() -> None:
    docs = (ROOT / "docs" / "operations.md").read_text("utf-8")
    shown = next(part for part in docs.split("```python\n")[1:] if "class HouseRules" in part).partition("```")[0]
    _, _, code = (ROOT / "examples" / "house_rules.py").read_text("utf-8").partition('"""\n\n')
    assert shown == code


def test_requests_are_measured_wherever_the_customer_wrote() -> None:
    long, user = "x" * 100_000, [Message("user", "hi")]
    for request in (
        GenerateRequest(prompt=long),
        GenerateRequest(messages=[Message("user", long)]),
        GenerateRequest(messages=user, tools=[Tool("f", long)]),
        GenerateRequest(messages=user, tools=[Tool("f", "", {"description": long})]),
        GenerateRequest(messages=[*user, Message("assistant", "", [ToolCall("a", "f", json.dumps({"x": long}))])]),
        GenerateRequest(messages=user, schema={"description": long}),
    ):
        with pytest.raises(Refused):
            review_request(RULES, request, "laptop")
    assert review_request(RULES, PLAIN, "laptop") == PLAIN


def test_numbers_are_hidden_wherever_an_answer_is_cut() -> None:
    assert answered("call 555-", "0100 now") == ["call ", "[number] now", ""]
    assert answered("call 555-", "0100", " or 555-0101") == ["call ", "", "[number] or ", ""]
    for end in range(len("call 555-0100")):  # wherever the customer ends it
        assert "5" not in "".join(answered("call 555-0100"[:end]))


def test_rules_at_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # which `compose` changes
    rules = compose("examples.house_rules:HouseRules", None)

    class Caller(FakeEngine):
        def generate(self, request: GenerateRequest, link: Link):
            yield from (Chunk("call 555-"), Chunk("0100 now"), Chunk("", "stop", 1, 3))

    with serving(home, Caller(), rules=rules) as server, working(server, enrol(home)) as worker:
        assert "".join(c.text for c in worker.generate(PLAIN)) == "call [number] now"
        with pytest.raises(Refused, match="20,000 bytes"):
            list(worker.generate(GenerateRequest(prompt="x" * 30_000)))
