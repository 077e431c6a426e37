"""Tools and response formats at the edge's API: what is asked of the trusted side, and how calls are worded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from link_fakes import FakeEngine, enrol, serving, working
from starlette.testclient import TestClient

from sliplm.edge.api import create_app
from sliplm.edge.worker import EdgeWorker
from sliplm.engine.tools import Syntax
from sliplm.protocol.messages import (
    CallPiece,
    Chunk,
    GenerateRequest,
    Message,
    TokenLogprob,
    Tool,
    ToolCall,
    decode_request,
    encode,
)
from sliplm.serve.rules import Rules

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
F = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
G = {"type": "function", "function": {"name": "g"}}
CHUNKS = [
    Chunk("Look"),
    Chunk("", calls=[CallPiece(0, "id0", "f"), CallPiece(0, arguments='{"a"')]),
    Chunk("", calls=[CallPiece(0, arguments=": 1}"), CallPiece(1, "id1", "g"), CallPiece(1, arguments="{}")]),
    Chunk("", None, 3, 8, [TokenLogprob("}", -1.0)]),
    Chunk("", "tool_calls", 3, 9),
]


class Backend:
    def __init__(self, chunks: list[Chunk]) -> None:
        self.asked, self.chunks = list[GenerateRequest](), chunks

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        yield from self.chunks


def client(backend: Any) -> TestClient:
    return TestClient(create_app(backend, lambda: "m"), base_url="http://localhost")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"tools": [F, G]}, {"tools": [Tool("f", "d", {"type": "object"}), Tool("g")]}),
        ({"tools": [F, G], "tool_choice": "required"}, {"must_call": ["f", "g"]}),
        ({"tools": [G], "tool_choice": "auto", "parallel_tool_calls": False}, {"parallel_calls": False}),
        ({"tools": [F, G], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         {"must_call": ["g"], "parallel_calls": False}),
        ({"tools": [F], "tool_choice": "none"}, {"tools": []}),
        ({"parallel_tool_calls": False, "tool_choice": "auto"}, {"tools": [], "parallel_calls": True}),
        ({"response_format": {"type": "text"}}, {"schema": None}),
        ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"a": 1}}}},
         {"schema": {"a": 1}}),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_trusted_side(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    backend = Backend(CHUNKS)
    assert client(backend).post(CHAT, json=HELLO | asked).status_code == 200
    (request,) = backend.asked
    assert {name: getattr(request, name) for name in expected} == expected
    assert decode_request(encode(request)) == request


def test_earlier_calls_and_their_results() -> None:
    call = {"id": "id0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "id0", "content": [{"type": "text", "text": "3"}]},
    ]
    backend = Backend(CHUNKS)
    assert client(backend).post(CHAT, json={"messages": HELLO["messages"] + history}).status_code == 200
    assert backend.asked[0].messages == [
        Message("user", "hello"),
        Message("assistant", "", [ToolCall("id0", "f", "{}")]),
        Message("tool", "3", [], "id0"),
    ]
    assert b"tool" not in encode(GenerateRequest(messages=[Message("user", "x")]))  # older trusted sides know none


def test_calls_at_once_and_in_pieces() -> None:
    here = client(Backend(CHUNKS))
    (choice,) = here.post(CHAT, json=HELLO).json()["choices"]
    calls = [
        {"id": "id0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "id1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    message = {"role": "assistant", "content": "Look", "refusal": None, "tool_calls": calls}
    assert choice["message"] == message and choice["finish_reason"] == "tool_calls"
    assert len(choice["logprobs"]["content"]) == 1
    lines = here.post(CHAT, json=HELLO | {"stream": True}).text.strip().split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    assert deltas == [
        {"role": "assistant", "content": "Look"},
        {"content": None, "tool_calls": [
            {"index": 0, "id": "id0", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}]},
        {"content": None, "tool_calls": [
            {"index": 0, "function": {"arguments": ": 1}"}},
            {"index": 1, "id": "id1", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"content": ""},
        {"content": ""},
    ]  # fmt: skip


class Calling(FakeEngine):
    """Writes a call, in three pieces."""

    syntax = Syntax('<c>{"name": "', '", "arguments": ', None, "}</c>")

    def generate(self, request: GenerateRequest, link: Any) -> Iterator[Chunk]:
        for i, text in enumerate(('I <c>{"name": "f"', ', "arguments": {"secret": 1}', "}</c>")):
            yield Chunk(text, None, 3, i + 1)
        yield Chunk("", "stop", 3, 3)


class Watching(Rules):
    def __init__(self) -> None:
        self.requests, self.texts = list[GenerateRequest](), list[str]()

    def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
        self.requests.append(request)
        return request

    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        self.texts.append(text)
        return text.replace("secret", "######") if finished else ""


def test_the_owners_rules_see_tools_and_calls_before_anybody_else(home) -> None:
    rules = Watching()
    with serving(home, Calling(), rules=rules) as server, working(server, enrol(home)) as worker:
        assert isinstance(worker, EdgeWorker)
        (choice,) = client(worker.generate).post(CHAT, json=HELLO | {"tools": [F]}).json()["choices"]
    assert rules.requests[0].tools == [Tool("f", "d", {"type": "object"})]
    assert rules.texts[-1] == 'I <c>{"name": "f", "arguments": {"secret": 1}}</c>'
    assert choice["message"]["content"] == "I" and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"######": 1}'}


@pytest.mark.slow
def test_the_edge_does_without_the_trusted_sides_libraries() -> None:
    code = "import sliplm.edge.api, sliplm.edge.serve, sys; print('llguidance' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "False"
