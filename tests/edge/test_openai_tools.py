"""OpenAI's own client with tools and JSON Schemas, against a model with random weights that follows what it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import templates
from openai_client import HELLO, MODEL, Pair, chat
from tiny import byte_tokenizer, save_tiny

from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow


class Forecast(pydantic.BaseModel):
    """The weather of a day."""

    city: Literal["Bonn", "Köln"]
    rain: bool
    hours: int | None = pydantic.Field(ge=0, le=24)


SCHEMA = Forecast.model_json_schema() | {"additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {
    "type": "object", "properties": {}, "additionalProperties": False}}}  # fmt: skip
MUST = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    home = tmp_path_factory.mktemp("tools")
    model = save_tiny(home / "model", max_position_embeddings=4096)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = templates.HERMES
    tokenizer.save_pretrained(model)
    split_model(str(model), home / "split", Options(rank=4))
    pair = Pair(home, home / "split", "--allow-logprobs")
    yield pair.client
    pair.close()


def ask(client: openai.OpenAI, **what: Any) -> Any:
    return chat(client, **{"max_tokens": 300, "temperature": 1, "seed": 3, **what})


def test_a_named_function_and_its_result(client: openai.OpenAI) -> None:
    whole = ask(client, tools=[WEATHER, TIME], tool_choice=MUST)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    Forecast.model_validate_json(call.function.arguments)
    history = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = ask(client, messages=history, tools=[WEATHER], max_tokens=5)
    assert answer.usage.prompt_tokens > whole.usage.prompt_tokens and answer.choices[0].finish_reason
    assert ask(client, messages=history, tools=[WEATHER], tool_choice="none", max_tokens=5).choices


def test_streams_hold_the_same_calls(client: openai.OpenAI) -> None:
    for choice in (MUST, "required"):
        wanted = {"tools": [WEATHER], "tool_choice": choice, "n": 2}
        whole = ask(client, **wanted)
        made: dict[int, dict[int, list[str]]] = {0: {}, 1: {}}
        ends, pieces = {}, 0
        for event in ask(client, stream=True, **wanted):
            for each in event.choices:
                assert not each.delta.content
                ends[each.index] = each.finish_reason
                for call in each.delta.tool_calls or ():
                    pieces += 1
                    if call.id:
                        assert call.type == "function" and call.index == len(made[each.index])
                        made[each.index][call.index] = [call.function.name, ""]
                    made[each.index][call.index][1] += call.function.arguments or ""
        assert pieces > 20
        for each in whole.choices:
            assert ends[each.index] == each.finish_reason
            found = [[c.function.name, c.function.arguments] for c in each.message.tool_calls]
            assert list(made[each.index].values()) == found


def test_required_calls_one_of_the_functions(client: openai.OpenAI) -> None:
    names = set()
    for seed in range(5):
        choice = ask(
            client, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False, seed=seed
        ).choices[0]
        (call,) = choice.message.tool_calls
        names.add(call.function.name)
        assert choice.finish_reason == "tool_calls" and isinstance(json.loads(call.function.arguments), dict)
    assert names <= {"get_weather", "get_time"}


def test_no_call_of_the_models_own(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = ask(client, tools=[WEATHER], tool_choice=choice, max_tokens=8).choices[0]
        assert answer.message.tool_calls is None and isinstance(answer.message.content, str)


def test_structured_output(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "messages": HELLO, "max_tokens": 300, "seed": 5}
    answer = client.chat.completions.parse(**wanted, response_format=Forecast).choices[0]
    assert isinstance(answer.message.parsed, Forecast) and answer.finish_reason == "stop"
    tool = openai.pydantic_function_tool(Forecast, name="forecast")
    call = client.chat.completions.parse(**wanted, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert isinstance(call.choices[0].message.tool_calls[0].function.parsed_arguments, Forecast)
    with client.chat.completions.stream(**wanted, response_format=Forecast) as events:
        assert events.get_final_completion().choices[0].message.parsed == answer.message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**wanted | {"max_tokens": 4}, response_format=Forecast)


def test_any_json(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = ask(client, response_format={"type": "json_object"}, seed=seed, max_tokens=60).choices[0]
        assert answer.message.content.startswith("{")
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
         "the JSON schema is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
          "tool_choice": "required"}, "are not an object"),
        ({"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, "not a JSON object"),
    ],
)  # fmt: skip
def test_refusals(client: openai.OpenAI, what: dict[str, Any], says: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, stream=stream, **what)


def test_logprobs_of_calls(client: openai.OpenAI) -> None:
    wanted = {"tools": [WEATHER], "tool_choice": MUST, "logprobs": True}
    content = ask(client, **wanted).choices[0].logprobs.content
    streamed = [e.choices[0].logprobs for e in ask(client, stream=True, **wanted)]
    assert [t for each in streamed if each for t in each.content] == content
    assert "".join(t.token for t in content).startswith("<tool_call>")
