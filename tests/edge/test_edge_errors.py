"""The edge's OpenAI-compatible API: what it refuses, and what failures look like."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from edge_api import CHAT, HELLO, PLAIN, Backend, error_of, events, listening, local
from link_fakes import wait_until

from sliplm.edge.api import create_app, generations
from sliplm.errors import (
    BundleError,
    BusyError,
    HandshakeError,
    IdentityError,
    InternalError,
    LinkError,
    ProtocolError,
    RequestError,
    TooLongError,
    VerificationError,
    VersionError,
)
from sliplm.protocol.messages import Chunk, GenerateRequest

F = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "no content"),
        (CHAT, HELLO | {"tool_choice": "required"}, "no tools"),
        (CHAT, HELLO | {"temperature": -1e-8}, "temperature"),
        (CHAT, HELLO | {"top_p": -0.5}, "top_p"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, HELLO | {"tools": [F, F]}, "same name"),
        (CHAT, HELLO | {"tools": [F] * 129}, "'tools'"),
        (CHAT, HELLO | {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        (CHAT, HELLO | {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "no tool 'g'"),
        (CHAT, HELLO | {"functions": [{"name": "f"}]}, "'tools'"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only an assistant"),
        (CHAT, HELLO | {"response_format": {"type": "xml"}}, "response_format"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema.schema"),
        (PLAIN, {"prompt": "x", "tools": [F]}, "tools"),
        (CHAT, HELLO | {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, HELLO | {"logit_bias": {"50256": -100}}, "logit_bias"),
        (CHAT, HELLO | {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHAT, HELLO | {"store": True}, "stored"),
        (CHAT, HELLO | {"service_tier": "priority"}, "service_tier"),
        (CHAT, HELLO | {"wibble": 1}, "Unknown parameter: 'wibble'"),
        (CHAT, HELLO | {"n": 0}, "'n'"),
        (CHAT, HELLO | {"n": 17}, "'n'"),
        (CHAT, HELLO | {"n": "2"}, "'n'"),
        (CHAT, HELLO | {"logprobs": 3}, "logprobs"),
        (CHAT, HELLO | {"top_logprobs": 3}, "needs 'logprobs'"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        (CHAT, HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        (CHAT, HELLO | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, HELLO | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, HELLO | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CHAT, HELLO | {"frequency_penalty": -2.5}, "frequency_penalty"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "tool"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens"),
        (CHAT, HELLO | {"max_tokens": "many"}, "max_tokens"),
        (CHAT, HELLO | {"temperature": 3}, "temperature"),
        (CHAT, HELLO | {"seed": -1}, "seed"),
        (CHAT, HELLO | {"stop": ["x"] * 17}, "stop"),
        (CHAT, HELLO | {"stop": ""}, "stop"),
        (CHAT, HELLO | {"presence_penalty": 3}, "presence_penalty"),
        (CHAT, HELLO | {"stream": "yes"}, "stream"),
        (PLAIN, {}, "prompt"),
        (PLAIN, {"prompt": []}, "answers"),
        (PLAIN, {"prompt": [1, 2, 3]}, "prompt"),
        (PLAIN, {"prompt": ["a"] * 9, "n": 2}, "answers"),
        (PLAIN, {"prompt": "x", "best_of": 2}, "best_of"),
        (PLAIN, {"prompt": "x", "suffix": "y"}, "suffix"),
        (PLAIN, {"prompt": "x", "logprobs": True}, "logprobs"),
        (PLAIN, {"prompt": "x", "messages": []}, "messages"),
        (PLAIN, {"prompt": "x", "echo": True}, "echo"),
        (PLAIN, {"prompt": "\ud800"}, "valid"),
        (PLAIN, [], "object"),
    ],
)
def test_bad_requests_are_named(client, backend, path, body, says):
    error = error_of(client.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 400)
    assert says in error["message"] and error["type"] == "invalid_request_error"
    of_the_whole = body == [] or says in ("valid", "same name") or "greedy" in says
    assert error["code"] and (error["param"] is None) == of_the_whole
    assert not backend.asked


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\xff"}'])
def test_bodies_that_are_no_json(client, data):
    error_of(client.post(PLAIN, content=data, headers={"content-type": "application/json"}), 400)


def test_other_refusals(client):
    assert error_of(client.post(PLAIN, json={"prompt": "x", "model": "gpt"}), 404)["code"] == "model_not_found"
    error_of(client.post(PLAIN, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 415)
    error_of(client.post(PLAIN, json={"prompt": "x" * (1 << 20)}), 413)
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    error_of(client.get("/nowhere"), 404)
    error_of(client.get(CHAT), 405)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("the prompt is too long"), 400, "invalid_request"),
        (TooLongError("This model's maximum context length is 8 tokens."), 400, "context_length_exceeded"),
        (BusyError("too many requests"), 429, "rate_limit_exceeded"),
        (LinkError("the trusted side cannot be reached"), 503, "trusted_unavailable"),
        (IdentityError("revoked"), 403, "refused"),
        (HandshakeError("of another authority"), 403, "refused"),
        (BundleError("another split"), 403, "refused"),
        (VersionError("update the older one"), 403, "refused"),
        (VerificationError("failed its check"), 502, "verification_failed"),
        (ProtocolError("out of turn"), 502, "protocol_error"),
        (InternalError("generation failed"), 500, "internal_error"),
        (RuntimeError("a secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_text_have_a_status(error, status, code, stream, caplog):
    client = local(create_app(Backend(error)))
    response = client.post(PLAIN, json={"prompt": "x", "stream": stream})
    shown = error_of(response, status)
    assert shown["code"] == code and "secret" not in shown["message"] + caplog.text
    assert (int(response.headers.get("retry-after", 0)) > 0) == (status == 429)
    assert ("RuntimeError in edge_api.py" in caplog.text) == isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (LinkError("the trusted side cannot be reached"), 2),
        (BusyError("too many requests", 1), 2),
        (IdentityError("revoked"), 1),
        (VerificationError("failed its check"), 1),
        (ProtocolError("out of turn"), 1),
        (InternalError("generation failed"), 1),
        (RuntimeError("a bug of the edge"), 1),
    ],
)
def test_openai_s_client_tries_again_only_what_passes(error, asked, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0)
    backend = Backend(error)
    client = openai.OpenAI(
        base_url="http://localhost/v1", api_key="x", max_retries=1, http_client=local(create_app(backend))
    )
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="slip", prompt="x")
    assert len(backend.asked) == asked
    assert (str(error) in caught.value.message) == (not isinstance(error, RuntimeError))


@pytest.mark.parametrize("error", [LinkError("generation stopped"), RuntimeError("a secret")])
def test_failures_in_the_middle_end_the_stream_without_done(error):
    client = local(create_app(Backend(error, after=1)), raise_server_exceptions=False)
    first, last = events(client.post(PLAIN, json={"prompt": "x", "stream": True}))
    assert first["choices"][0]["text"] == "Hel" and last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert "Hel" not in client.post(PLAIN, json={"prompt": "x"}).text


def test_a_generation_that_just_ends_is_an_error():
    client = local(create_app(lambda request: iter([Chunk("Hel")])))
    error_of(client.post(PLAIN, json={"prompt": "x"}), 503)


def test_one_failing_choice_fails_the_request():
    closed = threading.Event()

    class Endless(Iterator[Chunk]):
        def __next__(self) -> Chunk:
            time.sleep(0.01)
            return Chunk("x")

        def close(self) -> None:
            closed.set()

    def generate(request: GenerateRequest) -> Iterator[Chunk]:
        if request.seed == 7:
            time.sleep(0.1)
            raise VerificationError("failed its check")
        return Endless()

    error_of(local(create_app(generate)).post(PLAIN, json={"prompt": "x", "n": 2, "seed": 7}), 502)
    assert closed.wait(10)


def test_too_many_waiting_requests_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr(generations, "MAX_WAITING", 2)
    go, answers, started = threading.Event(), [], []

    def generate(_: GenerateRequest) -> Iterator[Chunk]:
        started.append(1)
        yield Chunk("x")
        go.wait(10)
        yield Chunk("", "stop", 1, 1)

    with listening(create_app(generate)) as url:
        body = {"prompt": "x", "n": generations.MAX_GENERATIONS + 2}
        first = threading.Thread(target=lambda: answers.append(httpx.post(url + PLAIN, json=body, timeout=20)))
        first.start()
        wait_until(lambda: len(started) == generations.MAX_GENERATIONS)
        response = httpx.post(url + PLAIN, json={"prompt": "x"})
        assert error_of(response, 429)["code"] == "rate_limit_exceeded" and int(response.headers["retry-after"]) > 0
        go.set()
        first.join(20)
    assert answers[0].status_code == 200 and len(answers[0].json()["choices"]) == body["n"]
