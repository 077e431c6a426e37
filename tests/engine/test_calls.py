"""Calls in what a model writes: whatever comes, in whatever pieces, nothing breaks, and what is a call is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import templates
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from sliplm.engine.calls import Calls, find_calls
from sliplm.engine.template import Chat
from sliplm.engine.tools import NO_TOOLS, OTHER_CALLS, Syntax, find_syntax, worded
from sliplm.errors import RequestError
from sliplm.protocol.messages import Chunk, Message, ToolCall


def syntax_of(template: str) -> Syntax:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return find_syntax(Chat(tokenizer, len(tokenizer)).example)


SYNTAXES = {
    name: syntax_of(template)
    for name, template in {
        "hermes": templates.HERMES,
        "llama": templates.LLAMA,
        "mistral": templates.MISTRAL,
        "function": templates.FUNCTION,
    }.items()
}
NAMES = ("get_weather", "f")
every_syntax = pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)


def split(syntax: Syntax, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str | None, str]]]:
    """The text, and each call's name and arguments."""
    calls, text, found = Calls(syntax, NAMES, **options), "", list[list[str]]()
    for i, piece in enumerate([*pieces, ""]):
        more, parts = calls.push(piece, i == len(pieces))
        text += more
        for part in parts:
            if part.id is not None:
                assert part.index == len(found) and len(part.id) == 9 and part.id.isalnum()
                found.append([part.name, ""])
            assert part.index == len(found) - 1
            found[-1][1] += part.arguments
    assert len({n for n, _ in found} - set(NAMES)) == 0
    return text, [(name, arguments) for name, arguments in found]


def written(syntax: Syntax, *calls: tuple[str, str]) -> str:
    one = [name + syntax.mid + arguments for name, arguments in calls]
    return syntax.head + (syntax.joint or "?").join(one) + syntax.tail


def test_the_syntax_is_the_templates_own() -> None:
    assert SYNTAXES["hermes"].head == '<tool_call>\n{"name": "' and SYNTAXES["hermes"].marker == "<tool_call>"
    assert SYNTAXES["llama"] == Syntax('{"name": "', '", "parameters": ', None, "}")
    assert SYNTAXES["mistral"] == Syntax('[TOOL_CALLS] [{"name": "', '", "arguments": ', '}, {"name": "', "}]")
    assert SYNTAXES["function"] == Syntax("<function=", ">", "</function><function=", "</function>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (byte_tokenizer().chat_template, NO_TOOLS),
        ("{{ raise_exception('no') }}", NO_TOOLS),
        ("{% if", NO_TOOLS),
        ("{{ tools }}", OTHER_CALLS),
        (templates.XML, OTHER_CALLS),
        (templates.HERMES.replace("call.arguments | tojson", "call.nothing.here"), OTHER_CALLS),
    ],
)
def test_templates_that_know_no_tools(template: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        syntax_of(template)
    assert str(caught.value) == says


@every_syntax
def test_calls_come_piece_by_piece(syntax: Syntax) -> None:
    calls = [("get_weather", '{"city": "K\\"}\\\\", "n": [1, {"a": {}}]}'), ("f", "{}")]
    calls = calls if syntax.joint else calls[:1]
    text = written(syntax, *calls)
    assert split(syntax, [text]) == split(syntax, list(text)) == ("", calls)
    if syntax.marker:
        said = "Let me <look>.\n" + text + "\n"
        assert split(syntax, [said]) == split(syntax, list(said)) == ("Let me <look>.", calls)
    assert split(syntax, list(text), parallel=False) == ("", calls[:1])
    stream = Calls(syntax, NAMES)
    assert len([piece for c in text for piece in stream.push(c)[1]]) > 20 and stream.count == len(calls)


@every_syntax
def test_models_have_their_own_spaces_orders_and_members(syntax: Syntax) -> None:
    loose = written(syntax, ("f", "{}")).replace("\n", "").replace(": ", ":")
    assert split(syntax, list(loose)) == ("", [("f", "{}")])
    spaced = "\n " + written(syntax, ("f", '{"a": 1}')).replace("{", "{ ").replace("\n", " \n ")
    assert split(syntax, list(spaced))[1][0][0] == "f" and split(syntax, [spaced])[0].strip() == ""
    if "{" not in syntax.head:
        return
    member = syntax.mid.split('"')[2]
    for value in (
        f'{{"{member}": {{"a": 1}}, "name": "f"}}',
        f'{{"type": "function", "name": "f", "{member}": {{"a": 1}}}}',
        f'{{"name": "f", "{member}": {{"a": 1}}, "id": "123"}}',
    ):
        closing = syntax.tail.lstrip("}] \n")
        value = f"[{value}]" if "[{" in syntax.head else value
        said = f"{syntax.marker}{value}{closing}"
        assert split(syntax, [said]) == split(syntax, list(said)) == ("", [("f", '{"a": 1}')])


@every_syntax
def test_what_only_looks_like_a_call_is_text(syntax: Syntax) -> None:
    for said in (
        written(syntax, ("unknown", "{}")),
        syntax.head,
        syntax.head + "f" + syntax.mid,
        syntax.marker + " and so on",
        syntax.marker + '{"answer": 42}',
        syntax.marker + '{"answer": ',
        "a " + syntax.marker + " b " + syntax.marker[:-1],
    ):
        assert split(syntax, [said]) == split(syntax, list(said)) == (said, [])


@every_syntax
def test_a_call_that_is_cut_is_a_call(syntax: Syntax) -> None:
    text = written(syntax, ("f", '{"city": "Bonn"}'))
    end = text.index("Bonn") + 2
    assert split(syntax, [text[:end]]) == ("", [("f", '{"city": "Bo')])
    assert split(syntax, list(text[: text.index("Bonn") + 6])) == ("", [("f", '{"city": "Bonn"}')])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)
arguments = st.dictionaries(st.text(), json_values, max_size=3)
parts = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    '{"name": "f", ',
    '"arguments": {',
    '"parameters": {"a": 1}',
    "}",
]
parts += ["\n", " ", ", ", "[", "]", '"', "<function=f>", "<function=", "{}", "</function>", '{"name": "', "f", "\\"]
noise = st.lists(st.sampled_from(parts) | st.text(max_size=3), max_size=20)


@pytest.mark.parametrize("name", SYNTAXES)
@settings(max_examples=150, deadline=None)
@given(pieces=noise)
def test_any_text_in_any_pieces(name: str, pieces: list[str]) -> None:
    text, calls = split(SYNTAXES[name], ["".join(pieces)])
    assert split(SYNTAXES[name], pieces) == split(SYNTAXES[name], list("".join(pieces))) == (text, calls)
    if not calls:
        assert text == "".join(pieces)


@pytest.mark.parametrize("name", SYNTAXES)
@settings(max_examples=60, deadline=None)
@given(made=st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3), size=st.integers(1, 9))
def test_well_formed_calls_come_back(name: str, made: list[tuple[str, dict[str, Any]]], size: int) -> None:
    syntax = SYNTAXES[name]
    text = written(syntax, *((n, json.dumps(a)) for n, a in (made if syntax.joint else made[:1])))
    said, calls = split(syntax, [text[i : i + size] for i in range(0, len(text), size)])
    assert said == "" and [(n, json.loads(a)) for n, a in calls] == (made if syntax.joint else made[:1])


def test_the_reason_for_the_end() -> None:
    text = written(SYNTAXES["hermes"], ("f", "{}"))
    for said, finish, reason in ((text, "stop", "tool_calls"), (text, "length", "length"), ("hello", "stop", "stop")):
        (chunk,) = find_calls(iter([Chunk(said, finish, 3, 4)]), Calls(SYNTAXES["hermes"], NAMES))  # type: ignore[arg-type]
        assert (chunk.finish_reason, chunk.prompt_tokens, chunk.completion_tokens) == (reason, 3, 4)
        assert bool(chunk.calls) == (said == text) and chunk.text == ("" if said == text else said)


def test_earlier_turns_as_templates_take_them() -> None:
    call = ToolCall("abcdef123", "f", '{"a": 1}')
    chat = worded([Message("assistant", "", [call]), Message("tool", "3", [], call.id), Message("tool", "4", [], "x")])
    assert chat[0]["tool_calls"] == [
        {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]
    assert chat[1] == {"role": "tool", "content": "3", "tool_call_id": "abcdef123", "name": "f"}
    assert "name" not in chat[2] and worded([Message("user", "x")]) == [{"role": "user", "content": "x"}]
    assert (
        worded([Message("assistant", "", [ToolCall("i", "f", "")])])[0]["tool_calls"][0]["function"]["arguments"] == {}
    )
    for arguments in ("[1]", "{", "3", "[" * 5000):
        with pytest.raises(RequestError, match="not a JSON object"):
            worded([Message("assistant", "", [ToolCall("i", "f", arguments)])])
