"""OpenAI's own clients, for Python and for Node."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess

import openai
import pytest
from conftest import CAPITAL, HERE, Server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


def test_python(client: openai.OpenAI, server: Server) -> None:
    assert [m.id for m in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    answer = client.chat.completions.create(model=server.model, messages=CAPITAL, temperature=0, max_tokens=8)
    said = answer.choices[0].message
    assert "Paris" in said.content and answer.usage.completion_tokens <= 8
    stream = client.chat.completions.create(
        model=server.model, messages=CAPITAL, temperature=0, max_tokens=8, stream=True
    )
    assert "".join(e.choices[0].delta.content or "" for e in stream) == said.content
    turns = [*CAPITAL, said, {"role": "user", "content": "And of Italy?"}]
    again = client.chat.completions.create(model=server.model, messages=turns, temperature=0, max_tokens=8)
    assert again.choices[0].message.content and again.usage.prompt_tokens > answer.usage.prompt_tokens
    plain = client.completions.create(
        model=server.model, prompt="The capital of France is", temperature=0, max_tokens=4
    )
    assert "Paris" in plain.choices[0].text


def test_python_on_an_event_loop(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=server.model, messages=CAPITAL, temperature=0, max_tokens=8)
                  for _ in range(2))
            )  # fmt: skip
            return [a.choices[0].message.content for a in answers]

    first, second = asyncio.run(ask())
    assert first == second and first


def test_errors_in_python(client: openai.OpenAI, server: Server, too_long: list[dict[str, str]]) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens") as caught:
        client.chat.completions.create(model=server.model, messages=too_long)
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=CAPITAL)


def test_node(server: Server) -> None:
    done = subprocess.run(
        ["node", HERE / "openai.mjs", server.url, server.key, server.model, json.dumps(CAPITAL)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "NODE_USE_ENV_PROXY": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["models"] == [server.model]
    assert "Paris" in report["said"] and report["streamed"] == report["said"] and report["again"]
    assert report["status"] == 400 and report["code"] == "context_length_exceeded"
