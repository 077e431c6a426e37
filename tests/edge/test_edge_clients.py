"""What other people's clients, proxies and containers send, and need, without being broken."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from sliplm.edge.api import app as api
from sliplm.edge.api import create_app
from sliplm.edge.client import stream
from sliplm.errors import LinkError
from sliplm.protocol.messages import MAX_TOKENS, Chunk, GenerateRequest

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


class Backend:
    def __init__(self, *texts: str) -> None:
        self.texts = texts or ("Hello",)
        self.asked: list[GenerateRequest] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, request: GenerateRequest):
        self.asked.append(request)
        self.go.wait(10)
        yield from (Chunk(text) for text in self.texts)
        yield Chunk("", "stop", 3, 2)


@pytest.fixture
def backend() -> Backend:
    return Backend()


def client(backend: Backend, **options: Any) -> TestClient:
    return TestClient(create_app(backend, **{"model_name": lambda: "m", **options}), base_url="http://localhost")


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [], "functions": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"top_logprobs": 0, "logprobs": False},
        {"verbosity": "medium", "metadata": {"number": 1}},
        {"messages": [{"role": "user", "content": "x", "name": "Bob"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, *HELLO["messages"]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "id": "lc_1", "annotations": [1]}]}]},
        *(
            {"messages": [{"role": "assistant", "content": "x", key: value}, *HELLO["messages"]]}
            for key, values in {
                "provider_specific_fields": [None, {"refusal": None}],
                "reasoning_content": [None, "let me think"],
                "thinking_blocks": [None, [{"type": "thinking", "thinking": "hm"}]],
                "id": [None, "msg_1"],
                "annotations": [None, [], [{"type": "url_citation"}]],
                "audio": [None],
                "whatever comes next": [None, 1, {"deep": [[]]}],
            }.items()
            for value in values
        ),
    ],
)
def test_what_asks_for_nothing_is_no_mistake(backend: Backend, more: dict[str, Any]) -> None:
    answer = client(backend).post(CHAT, json=HELLO | more)
    assert answer.status_code == 200, answer.text
    assert all(m.content in ("hello", "x", "") for m in backend.asked[0].messages or ())


@pytest.mark.parametrize("more", [{"temperature": 1e-8}, {"top_p": 0}, {"temperature": 0, "top_p": 0}])
def test_next_to_nothing_means_the_likeliest_token(backend: Backend, more: dict[str, Any]) -> None:
    assert client(backend).post(CHAT, json=HELLO | more).status_code == 200
    assert (backend.asked[0].temperature, backend.asked[0].top_p) == (0.0, None)


def test_a_chat_without_a_limit_ends_where_the_model_ends_it(backend: Backend) -> None:
    here = client(backend)
    for path, body in ((CHAT, HELLO), (CHAT, HELLO | {"max_completion_tokens": 7}), (PLAIN, {"prompt": "x"})):
        assert here.post(path, json=body).status_code == 200
    assert [r.max_tokens for r in backend.asked] == [MAX_TOKENS, 7, 256]


def test_a_model_that_is_not_known_yet_is_not_another_one(backend: Backend) -> None:
    def away(request: GenerateRequest):
        raise LinkError("no trusted side is connected.")
        yield

    names: list[str | None] = [None]
    here = client(away, model_name=lambda: names[0])  # type: ignore[arg-type]
    for answer in (
        here.get("/v1/models"),
        here.get("/v1/models/m"),
        here.post(CHAT, json=HELLO | {"model": "m"}),
    ):
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "trusted_unavailable"
    names[0] = "m"
    assert here.get("/v1/models").json()["data"][0]["id"] == "m"
    assert here.post(CHAT, json=HELLO | {"model": "other"}).status_code == 404


def test_a_stream_without_text_says_that_it_lives(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "EARLY_SECONDS", 0.05)
    monkeypatch.setattr(api, "BEAT_SECONDS", 0.05)
    backend.go.clear()
    threading.Timer(0.5, backend.go.set).start()
    text = client(backend).post(CHAT, json=HELLO | {"stream": True}).text
    comments, _, rest = text.partition("data: ")
    assert comments.count(": still at it\n\n") >= 2 and set(comments.split("\n\n")) == {": still at it", ""}
    assert "Hello" in rest and rest.endswith("data: [DONE]\n\n")


def test_an_early_error_of_a_stream_has_a_status_and_a_late_one_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def failing(request: GenerateRequest):
        go.wait(10)
        raise LinkError("the trusted side went away")
        yield

    go.set()
    assert client(failing).post(CHAT, json=HELLO | {"stream": True}).status_code == 503  # type: ignore[arg-type]
    monkeypatch.setattr(api, "EARLY_SECONDS", 0.05)
    go.clear()
    threading.Timer(0.3, go.set).start()
    late = client(failing).post(CHAT, json=HELLO | {"stream": True})  # type: ignore[arg-type]
    assert late.status_code == 200 and "trusted_unavailable" in late.text and "[DONE]" not in late.text


def test_what_some_take_for_the_end_of_a_line_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "one\u2028two\u2029three\x85four\x0bfive\x1csix\r\n\n"
    app = create_app(Backend(said), lambda: "m")
    here = TestClient(app, base_url="http://localhost")
    text = here.post(CHAT, json=HELLO | {"stream": True}).text
    assert all(line.startswith("data: ") for line in text.splitlines() if line)
    monkeypatch.setattr("sliplm.edge.client._client", lambda *_: here)
    assert "".join(chunk.text for chunk in stream("http://localhost", "x", {})) == said
