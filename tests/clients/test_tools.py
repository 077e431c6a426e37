"""Tools and JSON, as LangChain's, instructor's and LiteLLM's users ask for them. What is asked for is so narrow that
any model's answer is right, if it is held to it."""

from __future__ import annotations

import json
from typing import Any, Literal

import instructor
import litellm
import openai
import pytest
from conftest import Server
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

PROMPT = "Describe a banana."


class Fruit(BaseModel):
    """A fruit."""

    color: Literal["red", "yellow", "green"]
    sweet: bool


@tool
def weigh(size: Literal["small", "large"]) -> str:
    """Weigh a fruit of this size."""
    return "100 g" if size == "small" else "200 g"


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


@pytest.fixture
def langchain(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=server.url, api_key=server.key, model=server.model, temperature=0, max_tokens=64, max_retries=0
    )


@pytest.mark.parametrize("mode", [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_instructor(client: openai.OpenAI, server: Server, mode: instructor.Mode) -> None:
    asking = instructor.from_openai(client, mode=mode)
    fruit = asking.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": PROMPT}], response_model=Fruit, max_retries=0,
        max_tokens=64, temperature=0,
    )  # fmt: skip
    assert isinstance(fruit, Fruit)


def test_openai_parses(client: openai.OpenAI, server: Server) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    what: Any = {"model": server.model, "messages": messages, "max_tokens": 64, "temperature": 0}
    whole = client.chat.completions.parse(response_format=Fruit, **what)
    assert isinstance(whole.choices[0].message.parsed, Fruit)
    with client.chat.completions.stream(response_format=Fruit, **what) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Fruit)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchains_structured_output(langchain: ChatOpenAI, method: Any) -> None:
    assert isinstance(langchain.with_structured_output(Fruit, method=method).invoke(PROMPT), Fruit)


def test_langchains_tools(langchain: ChatOpenAI) -> None:
    bound = langchain.bind_tools([weigh], tool_choice="weigh", parallel_tool_calls=False)
    asked = bound.invoke(PROMPT)
    (call,) = asked.tool_calls
    assert call["name"] == "weigh" and call["args"]["size"] in ("small", "large") and call["id"]
    result = weigh.invoke(call)
    assert isinstance(result, ToolMessage)
    assert langchain.bind_tools([weigh], max_tokens=4).invoke([HumanMessage(PROMPT), asked, result])
    whole: Any = None
    for chunk in bound.stream(PROMPT):
        whole = chunk if whole is None else whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(call["name"], call["args"])]


@pytest.mark.parametrize("stream", [False, True])
def test_litellms_tools(server: Server, stream: bool) -> None:
    function = {"name": "weigh", "description": "Weigh.", "parameters": weigh.get_input_jsonschema()}
    messages = [{"role": "user", "content": PROMPT}]
    answer: Any = litellm.completion(
        model=f"openai/{server.model}", api_base=server.url, api_key=server.key, messages=messages, max_tokens=64,
        temperature=0, tools=[{"type": "function", "function": function}], tool_choice="required",
        parallel_tool_calls=False, stream=stream, num_retries=0,
    )  # fmt: skip
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    call = answer.choices[0].message.tool_calls[0]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weigh" and json.loads(call.function.arguments)["size"] in ("small", "large")
