"""Tools and JSON Schemas at the engine: answers of a model with random weights, which follow only what they must."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import templates
import torch
import transformers
from loading import attached
from texts import make_bundle
from tiny import byte_tokenizer
from tokenizers import AddedToken

from sliplm.engine import constraint
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.calls import Calls, find_calls
from sliplm.engine.constraint import MAX_GRAMMAR_BYTES, Constraint, Grammars
from sliplm.engine.decoding import Decoding
from sliplm.engine.once import Once
from sliplm.engine.template import Chat
from sliplm.engine.tools import NO_TOOLS, Syntax, find_syntax
from sliplm.errors import RequestError, SlipError
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, Tool, ToolCall

pytestmark = pytest.mark.slow  # schemas are tried in a process of their own

USER = Message("user", "Hi")
CITY = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}, "days": {"type": "integer", "maximum": 9,
        "minimum": 1}}, "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
WEATHER = Tool("get_weather", "The weather", CITY)
TIME = Tool("time")


@pytest.fixture(scope="module")
def plain(tiny_split: Path) -> BuiltinEngine:
    """Its template has no tools."""
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0, allow_logprobs=True))


@pytest.fixture(params=["HERMES", "LLAMA", "MISTRAL", "FUNCTION"])
def engine(plain: BuiltinEngine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BuiltinEngine:
    return with_template(plain, getattr(templates, request.param), monkeypatch)


@pytest.fixture
def hermes(plain: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> BuiltinEngine:
    return with_template(plain, templates.HERMES, monkeypatch)


def with_template(engine: BuiltinEngine, template: str, monkeypatch: pytest.MonkeyPatch) -> BuiltinEngine:
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    monkeypatch.setattr(engine, "_room", 4000)
    monkeypatch.setattr(engine, "_syntax", Once(lambda: find_syntax(engine.chat.example)))
    return engine


def ask(engine: BuiltinEngine, **what: Any) -> tuple[str, list[tuple[str, Any]], Chunk]:
    """Text, calls, and the last chunk."""
    request = GenerateRequest(**{"messages": [USER], "max_tokens": 300, "temperature": 1.0, "seed": 1} | what)
    chunks = engine.generate(request, engine.model.slip.default_link)
    if request.tools:
        calls = Calls(engine.syntax, {t.name for t in request.tools}, request.parallel_calls)
        chunks = find_calls(chunks, calls)
    text, made = "", dict[int, list[str]]()
    for chunk in chunks:
        text += chunk.text
        for piece in chunk.calls:
            made.setdefault(piece.index, [piece.name or "", ""])[1] += piece.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in made.values()], chunk


@pytest.mark.parametrize("seed", [1, 2, None])
def test_a_call_that_must_be_made(engine: BuiltinEngine, seed: int | None) -> None:
    must = {"tools": [WEATHER, TIME], "must_call": ["get_weather"], "parallel_calls": False}
    text, calls, last = ask(engine, seed=seed, **must)
    ((name, arguments),) = calls
    assert text == "" and last.finish_reason == "tool_calls"
    assert name == "get_weather" and arguments["city"] in ("Bonn", "Köln") and 1 <= arguments["days"] <= 9
    assert set(arguments) == {"city", "days"}


def test_one_call_of_several_or_more(hermes: BuiltinEngine) -> None:
    tool = Tool("other", "", {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False})
    counts = set()
    for seed in range(4):
        _, calls, last = ask(hermes, tools=[WEATHER, tool], must_call=["get_weather", "other"], seed=seed)
        assert calls and last.finish_reason in ("tool_calls", "length")
        counts.add(len(calls))
    assert max(counts) > 1


def test_a_call_that_is_cut_off(hermes: BuiltinEngine) -> None:
    request = GenerateRequest(messages=[USER], tools=[WEATHER], must_call=["get_weather"], max_tokens=60)
    calls = Calls(hermes.syntax, {"get_weather"})
    *_, last = find_calls(hermes.generate(request, hermes.model.slip.default_link), calls)
    assert last.finish_reason == "length" and last.completion_tokens == 60 and calls.count == 1


def test_calls_of_the_models_own_choice_and_the_prompt(hermes: BuiltinEngine) -> None:
    text, calls, last = ask(hermes, tools=[WEATHER], max_tokens=10, temperature=0)
    assert text and not calls and last.finish_reason in ("stop", "length")

    def prompt(**what: Any) -> str:
        return hermes.tokenizer.decode(hermes._prompt(GenerateRequest(**what)))

    assert "get_weather" in prompt(messages=[USER], tools=[WEATHER]) and "<tools>" not in prompt(messages=[USER])
    call = ToolCall("abcdef123", "get_weather", '{"city": "Bonn"}')
    history = [USER, Message("assistant", "", [call]), Message("tool", "rain", [], call.id)]
    assert prompt(messages=history, tools=[WEATHER]).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "messages", [[USER], [USER, Message("assistant", "", [ToolCall("a", "f", "{}")])], [Message("tool", "x", [], "a")]]
)
def test_a_template_without_tools_refuses_them(plain: BuiltinEngine, smollm2: str, messages: list[Message]) -> None:
    tools = [] if len(messages) > 1 or messages[0].role == "tool" else [WEATHER]
    file = Path(smollm2)
    for tokenizer in (
        plain.tokenizer,
        transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name),
    ):
        engine = BuiltinEngine.__new__(BuiltinEngine)
        engine._syntax = Once(lambda tokenizer=tokenizer: find_syntax(Chat(tokenizer, len(tokenizer)).example))
        with pytest.raises(RequestError) as caught:
            engine._prompt(GenerateRequest(messages=messages, tools=tools))
        assert str(caught.value) == NO_TOOLS


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_an_answer_follows_its_schema(plain: BuiltinEngine, temperature: float) -> None:
    for what in ({"messages": [USER]}, {"messages": None, "prompt": "Hello"}):
        text, _, last = ask(plain, schema=CITY, temperature=temperature, top_k=3, top_p=0.5, max_tokens=90, **what)
        answer = json.loads(text)
        assert last.finish_reason == "stop" and answer["city"] in ("Bonn", "Köln") and 1 <= answer["days"] <= 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_owners_style_does_not_keep_an_answer_from_its_schema(
    plain: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    settings = transformers.GenerationConfig(
        no_repeat_ngram_size=1, suppress_tokens=plain.tokenizer.encode('"'), min_new_tokens=100
    )
    monkeypatch.setattr(plain, "decoding", Decoding(settings, [256], 257))
    text, _, last = ask(plain, schema=CITY, temperature=temperature, max_tokens=90)
    assert last.finish_reason == "stop" and json.loads(text)["city"]


def test_every_way_to_lose_a_schema_has_its_sentence(plain: BuiltinEngine) -> None:
    def held(schema: dict[str, Any]) -> Constraint:
        return plain._grammars().constraint(GenerateRequest(prompt="x", schema=schema), None, 1)

    prompt, scores = torch.tensor([plain.tokenizer.encode("x")]), torch.zeros(1, 257)
    with pytest.raises(RequestError, match="no token that the JSON schema allows"):
        held({"const": "~"})(prompt, scores[:, :1])
    answer = held({"const": 2})
    answer(prompt, scores)
    with pytest.raises(SlipError, match="left the schema") as caught:
        answer(torch.tensor([plain.tokenizer.encode("x1")]), scores)
    assert not isinstance(caught.value, RequestError)
    costly = held({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"})
    costly(prompt, scores)
    with pytest.raises(RequestError, match="too complex"):
        costly(torch.tensor([plain.tokenizer.encode('x"')]), scores)


def test_an_object_has_the_properties_that_it_names(plain: BuiltinEngine) -> None:
    """As pydantic writes schemas, which does not say so."""
    part = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    whole = {"$defs": {"P": part}, "properties": {"one": {"$ref": "#/$defs/P"}, "many": {"type": "array", "items": part,
             "minItems": 1, "maxItems": 1}}, "required": ["one", "many"], "type": "object"}  # fmt: skip
    for seed in range(4):
        text, _, last = ask(plain, schema=whole, seed=seed, temperature=1.0, max_tokens=100)
        assert last.finish_reason == "stop" and json.loads(text) == {"one": {"a": 1}, "many": [{"a": 1}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"type": "object", "patternProperties": {"^x": {}}, "properties": {"a": {}}},
    ],
)
def test_objects_that_may_have_others_are_left_alone(schema: dict[str, Any]) -> None:
    (rule,) = constraint._rules({"content": schema}).values()
    assert json.loads(rule.removeprefix("%json ")) == {**schema, **constraint._STYLE}


def test_what_is_too_large_costs_one_look(plain: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[str]()
    monkeypatch.setattr(
        constraint.json, "dumps", lambda value, dumps=json.dumps: looks.append(dumps(value)) or looks[-1]
    )
    monkeypatch.setattr(constraint, "_closed", lambda _: pytest.fail("worked on before it was measured"))
    half = {"enum": ["x" * (MAX_GRAMMAR_BYTES // 2)]}
    tools = [Tool("a", "", {"properties": half}), Tool("b", "", {"properties": half})]
    for what in ({"schema": {"enum": ["x" * MAX_GRAMMAR_BYTES]}}, {"messages": [USER], "tools": tools}):
        request = GenerateRequest(**({"prompt": "x"} if "schema" in what else {}), **what)
        with pytest.raises(RequestError, match="bytes; at most"):
            plain._grammars().constraint(request, Syntax("<c>", "", None, "</c>") if request.tools else None, 0)
    assert sum(len(text) > 9999 for text in looks) == 3


def test_any_object(plain: BuiltinEngine) -> None:
    for seed in range(6):
        text, _, last = ask(plain, schema={"type": "object"}, seed=seed, max_tokens=100, frequency_penalty=1.0)
        assert text.startswith("{")
        if last.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert last.completion_tokens == 100
            with pytest.raises(ValueError):
                json.loads(text)


def test_a_schema_beside_tools(hermes: BuiltinEngine) -> None:
    seen = set()
    for seed in range(8):
        text, calls, _ = ask(hermes, schema=CITY, tools=[WEATHER], parallel_calls=False, seed=seed)
        seen.add(bool(calls))
        assert not text if calls else json.loads(text)["city"]
    assert seen == {True, False}


def test_with_stops_seeds_and_logprobs(plain: BuiltinEngine) -> None:
    text, _, _ = ask(plain, schema=CITY)
    assert ask(plain, schema=CITY)[0] == text
    stopped, _, last = ask(plain, schema=CITY, stop=['"days'])
    assert stopped == text[: text.index('"days')] and last.finish_reason == "stop"
    request = GenerateRequest(messages=[USER], max_tokens=90, schema=CITY, logprobs=2)
    chunks = list(plain.generate(request, plain.model.slip.default_link))
    probabilities = [p for c in chunks for p in c.logprobs]
    text = "".join(c.text for c in chunks).replace("ö", "\ufffd\ufffd")
    assert json.loads(text)["city"] and "".join(p.token for p in probabilities) == text
    # They are the model's own: it would have written something else.
    assert any(p.logprob < p.top[0][1] for p in probabilities)


def deep(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": deep(levels - 1)} if levels else {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": 5}, "must be a string"),
        ({"$ref": "http://example.com/x.json"}, "not present"),
        ({"$ref": "file:///etc/passwd"}, "not present"),
        ({"$ref": "#/$defs/nothing"}, "nothing"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"not": {}}, "not"),
        ({"type": "string", "format": "wibble"}, "Unknown format: wibble"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, ""),
        ({"enum": ["x" * MAX_GRAMMAR_BYTES]}, "bytes"),
        (deep(400), ""),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ],
)
def test_schemas_that_cannot_be_followed(plain: BuiltinEngine, schema: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match="the JSON schema") as caught:
        list(plain.generate(GenerateRequest(messages=[USER], schema=schema), plain.model.slip.default_link))
    assert says in str(caught.value) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
        {"type": "string", "pattern": "^(a|b)*a(a|b){200}$"},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"^x{i}[a-z]+"} for i in range(1000)}},
        {"anyOf": [{"type": "object", "properties": {f"a{i}": {"type": "integer"}}} for i in range(600)]},
        {"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for i in range(20)]} for j in range(10)]},
        {"$ref": "#"},
        {"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {}},
         "$ref": "#/$defs/d0"},
        deep(90),
    ],
)  # fmt: skip
def test_no_schema_exhausts_the_trusted_side(plain: BuiltinEngine, schema: dict[str, Any]) -> None:
    try:
        last = ask(plain, schema=schema, max_tokens=20)[2]
    except RequestError:
        return
    assert last.finish_reason in ("stop", "length")


def test_parameters_are_an_object(hermes: BuiltinEngine) -> None:
    with pytest.raises(RequestError, match="of the function f are not an object"):
        ask(hermes, tools=[Tool("f", "", {"type": "array"})], must_call=["f"])


def test_a_model_whose_answers_nothing_ends_is_held_to_nothing() -> None:
    with pytest.raises(RequestError, match="no token ends them"):
        Grammars(byte_tokenizer(), [])
    with pytest.raises(RequestError, match="its tokenizer does not allow it"):
        Grammars(object(), [1])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "markers", "call"),
    [
        ("MISTRAL", ["[TOOL_CALLS]"], '[TOOL_CALLS] [{"name": "time", "arguments": {}}]'),
        ("HERMES", ["<tool_call>", "</tool_call>"], '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'),
        ("FUNCTION", ["</function>"], "<function=time>{}</function>"),
    ],
)
def test_calls_are_written_with_the_models_own_tokens(
    special: bool, template: str, markers: list[str], call: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for m in markers])
    tokenizer.chat_template = getattr(templates, template)
    syntax = find_syntax(Chat(tokenizer, len(tokenizer)).example)
    own = tokenizer.convert_tokens_to_ids(markers)
    assert syntax.tokens(tokenizer) == (set(own) if special else set())
    with contextlib.closing(Grammars(tokenizer, [256])) as grammars:
        request = GenerateRequest(messages=[USER], tools=[TIME], must_call=["time"])
        matcher = grammars.constraint(request, syntax, 0)._matcher
    tokens = tokenizer.encode(call)
    assert set(own) <= set(tokens) and matcher.validate_tokens(tokens) == len(tokens)
    if special:  # spelt out, it would be no call
        spelt = [i for c in call for i in tokenizer.encode(c)]
        assert matcher.validate_tokens(spelt) < len(spelt)


@pytest.mark.parametrize("special", [True, False])
def test_a_model_with_markers_of_its_own_makes_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(m, special=special) for m in ("<tool_call>", "</tool_call>")])
    bundle = make_bundle(tmp_path, tokenizer, max_position_embeddings=4000)
    engine = with_template(attached(BuiltinEngine(bundle, stock=0)), templates.HERMES, monkeypatch)
    text, calls, last = ask(engine, tools=[WEATHER], must_call=["get_weather"], parallel_calls=False)
    assert not text and calls[0][1]["city"] and last.finish_reason == "tool_calls"
    said, calls, _ = ask(engine, tools=[WEATHER], schema=CITY, parallel_calls=False)
    assert calls or json.loads(said)["city"]
    engine.close()
