"""How a model calls functions, as its own chat template writes it.

A template renders calls of earlier turns the way the model was trained to write them. So an example is rendered, and
what lies around the name and the arguments is this model's syntax: `<tool_call>{"name": ...` for Hermes and Qwen,
`{"name": ..., "parameters": ...}` for Llama 3.1, `[TOOL_CALLS] [{"name": ...` for Mistral, and whatever others do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sliplm.errors import RequestError
from sliplm.protocol.messages import Message, Tool, ToolCall

NO_TOOLS = "this model's chat template has no tools."
OTHER_CALLS = "this model's chat template writes calls of tools in a way that is not supported."

_TEXT = "\u00a4"  # nothing that a call begins with
_ARGUMENTS = re.compile(r'\{\s*"sliplm"\s*:\s*"7"\s*\}')
_CALLS = [
    ToolCall(id, name, '{"sliplm": "7"}') for id, name in (("sliplmA01", "one_tool"), ("sliplmB02", "another_tool"))
]
_TOOLS = [Tool(call.name, "d", {"type": "object", "properties": {"sliplm": {"type": "string"}}}) for call in _CALLS]
_USER = Message("user", "u")


@dataclass(frozen=True)
class Syntax:
    """Calls are written `head name mid arguments (joint name mid arguments)* tail`; without a `joint`, there is one."""

    head: str
    mid: str
    joint: str | None
    tail: str

    @property
    def marker(self) -> str:
        """What tells the beginning of a call from text; empty if a call looks like any JSON object."""
        before, brace, _ = self.head.partition("{")
        return before.rstrip("[ \t\n").lstrip() if brace else before.strip()

    def tokens(self, tokenizer: Any) -> set[int]:
        """Special tokens that calls are written with, which other text is shown without."""
        written = self.head + self.mid + (self.joint or "") + self.tail
        return {i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content in written}


def described(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """`tools` as chat templates take them."""
    nothing = {"type": "object", "properties": {}}
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": t.parameters or nothing},
        }
        for t in tools
    ] or None


def worded(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` as chat templates take them: arguments as objects, results with the function's name. Raises
    RequestError for arguments that are no object."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    chat: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}}
                for c in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                turn["name"] = names[message.tool_call_id]
        chat.append(turn)
    return chat


def find_syntax(example: Callable[[Sequence[Message], Sequence[Tool]], str]) -> Syntax:
    """The syntax of a chat template, which renders examples (`Chat.example`). Raises RequestError if it knows no tools,
    or its calls are not a name followed by a JSON object."""

    def render(messages: list[Message], tools: list[Tool]) -> str | None:
        try:
            return example(messages, tools)
        except Exception:  # templates are programs of the model's author, and raise what they like
            return None

    with_tools = render([_USER], _TOOLS)
    if with_tools is None or with_tools == render([_USER], []):
        raise RequestError(NO_TOOLS)
    plain = render([_USER, Message("assistant", _TEXT)], _TOOLS)

    def calls(count: int) -> str | None:
        """What the assistant's turn holds when it makes so many calls: what differs from a turn of text."""
        whole = render([_USER, Message("assistant", "", _CALLS[:count])], _TOOLS)
        if whole is None or plain is None:
            return None
        begin = _shared(plain, whole)
        end = len(whole) - _shared(plain.rpartition(_TEXT)[2][::-1], whole[begin:][::-1])
        return _without_ids(whole[begin:end])

    one = calls(1)
    if one is None or (found := _parts(one, 0)) is None:
        raise RequestError(OTHER_CALLS)
    head, mid, tail = found
    joint = None
    if (both := calls(2)) is not None and (second := _parts(both, 1)) is not None:
        first = head + _CALLS[0].name + mid
        arguments = _ARGUMENTS.match(second[0], len(first))
        if second[0].startswith(first) and arguments and second[1:] == (mid, tail):
            joint = second[0][arguments.end() :]
    if any(call.id in part for call in _CALLS for part in (head, mid, joint or "", tail)) or not head.strip():
        raise RequestError(OTHER_CALLS)
    return Syntax(head, mid, joint, tail)


def _parts(text: str, number: int) -> tuple[str, str, str] | None:
    """What is before the name of call `number`, between it and the arguments, and after them."""
    head, name, rest = text.partition(_CALLS[number].name)
    arguments = _ARGUMENTS.search(rest)
    if not name or arguments is None:
        return None
    return head, rest[: arguments.start()], rest[arguments.end() :]


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_ids(text: str) -> str:
    """Models do not write the ids that some templates add: whoever runs the calls makes them up."""
    for call in _CALLS:
        text = re.sub(rf',\s*"\w+"\s*:\s*"{call.id}"|"\w+"\s*:\s*"{call.id}"\s*,\s*', "", text)
    return text


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError("the arguments of a tool call in the messages are not a JSON object.")
    return value
