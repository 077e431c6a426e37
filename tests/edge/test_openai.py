"""OpenAI's own client, and curl, against `slip trusted` and `slip edge` as their owners run them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_client import HELLO, MODEL, Pair, chat
from processes import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tiny_split: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("openai"), tiny_split, "--allow-logprobs")
    yield pair
    pair.close()


@pytest.fixture
def client(pair: Pair) -> openai.OpenAI:
    return pair.client


def plain(client: openai.OpenAI, **what: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": "Hello", "max_tokens": 12, **what})


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "sliplm"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("ask", [chat, plain])
def test_streams_hold_the_whole_answer(client: openai.OpenAI, ask: Any) -> None:
    whole = ask(client, temperature=0)
    text = whole.choices[0].message.content if ask is chat else whole.choices[0].text
    assert text and whole.choices[0].finish_reason in ("length", "stop")
    assert 0 < whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    events = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):  # how many were guessed depends on times
        assert getattr(events[-1].usage, count) == getattr(whole.usage, count)
    said = [e.choices[0].delta.content if ask is chat else e.choices[0].text for e in events[:-1]]
    assert len(said) > 2 and "".join(said) == text
    assert [e.choices[0].finish_reason for e in events[:-2]] == [None] * (len(events) - 2)
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    texts = [c.message.content for c in chat(client, n=3, seed=11, temperature=1.5, top_p=0.99).choices]
    assert len(set(texts)) == 3
    assert [c.message.content for c in chat(client, n=3, seed=11, temperature=1.5, top_p=0.99).choices] == texts
    assert chat(client, seed=11, temperature=1.5, top_p=0.99).choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for event in chat(client, n=3, seed=11, temperature=1.5, top_p=0.99, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content
    assert streamed == texts
    prompts = plain(client, prompt=["Hello", "World"], n=2, seed=3)
    assert [c.index for c in prompts.choices] == [0, 1, 2, 3]


def test_stops_and_limits(client: openai.OpenAI) -> None:
    text = plain(client, temperature=0, max_tokens=20).choices[0].text
    stop = next(text[i : i + 2] for i in range(3, len(text) - 1) if "\ufffd" not in text[i : i + 2])
    for stops in (stop, [stop, "never"]):
        answer = plain(client, temperature=0, max_tokens=20, stop=stops)
        assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    short = chat(client, max_tokens=openai.omit, max_completion_tokens=2, temperature=1.0)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, temperature=0, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert "".join(t.token for t in content).startswith(choice.message.content.partition("\ufffd")[0])
    for token in content:  # greedy takes the likeliest
        assert len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    streamed = [e.choices[0] for e in chat(client, temperature=0, logprobs=True, top_logprobs=2, stream=True)]
    assert [t for c in streamed if c.logprobs for t in c.logprobs.content] == content
    legacy = plain(client, temperature=0, logprobs=2).choices[0].logprobs
    assert len(legacy.tokens) == len(legacy.token_logprobs) == len(legacy.top_logprobs) == len(legacy.text_offset)
    assert chat(client).choices[0].logprobs is None


def test_penalties_and_notes(client: openai.OpenAI) -> None:
    repeats = plain(client, temperature=0, max_tokens=40).choices[0].text
    varied = plain(client, temperature=0, max_tokens=40, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert varied != repeats
    assert chat(client, user="me", metadata={"a": "b"}, response_format={"type": "text"}, store=False).choices
    first = chat(client)
    history = [*HELLO, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert chat(client, messages=history).choices


@pytest.mark.parametrize(
    ("what", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"extra_body": {"wibble": 1}}, "wibble", "unknown_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None, "invalid_request"),  # no place for them
        ({"messages": [{"role": "user", "content": "x" * 500}]}, None, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: openai.OpenAI, what: dict[str, Any], param: str | None, code: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stream=stream, **what)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


def test_other_errors(pair: Pair, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        chat(client.with_options(api_key="sk-wrong"))
    with pytest.raises(openai.APIStatusError) as too_large:
        chat(client, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert too_large.value.status_code == 413


def test_a_client_that_leaves_early(client: openai.OpenAI) -> None:
    with chat(client, stream=True, max_tokens=100) as events:
        next(iter(events))
    assert chat(client).choices


def curl(pair: Pair, path: str, *options: str) -> str:
    command = ["curl", "-sS", "--noproxy", "*", "-H", "Authorization: Bearer sk-local-key", *options, pair.api + path]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed: apt-get install curl")
def test_curl(pair: Pair) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": True})
    lines = curl(pair, "/v1/chat/completions", "-N", "--json", body).strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
    body = json.dumps({"prompt": "Hello", "max_tokens": 3})
    assert json.loads(curl(pair, "/v1/completions", "--json", body))["object"] == "text_completion"
    assert json.loads(curl(pair, "/v1/models"))["data"][0]["id"] == MODEL
    assert "slip_edge_tokens_total" in curl(pair, "/metrics")


def test_the_logs_are_json_and_hold_no_prompt(pair: Pair, client: openai.OpenAI) -> None:
    chat(client, messages=[{"role": "user", "content": "a-secret-prompt"}])
    lines = [json.loads(line) for line in pair.edge.log.splitlines()]
    assert lines and all(set(line) >= {"time", "level", "logger", "message"} for line in lines)
    for secret in ("a-secret-prompt", "Hello", "sk-local-key"):
        assert secret not in pair.edge.log + pair.trusted.log


def test_without_the_owners_consent_and_without_a_trusted_side(tiny_split: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_split)
    try:
        for ask, what in ((chat, {"logprobs": True}), (plain, {"logprobs": 0})):
            with pytest.raises(openai.BadRequestError, match="owner"):
                ask(pair.client, **what)
        assert httpx.get(f"{pair.api}/readyz", trust_env=False).status_code == 200
        pair.trusted.stop(signal.SIGKILL)

        def gone() -> None:
            assert httpx.get(f"{pair.api}/readyz", trust_env=False).status_code == 503

        eventually(gone)
        assert httpx.get(f"{pair.api}/healthz", trust_env=False).status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            chat(pair.client)
        assert caught.value.status_code == 503 and caught.value.code == "trusted_unavailable"
    finally:
        pair.close()
