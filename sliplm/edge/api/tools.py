"""Tools and response formats, between OpenAI's words and the protocol's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from sliplm.edge.api.errors import ApiError
from sliplm.protocol.messages import CallId, CallPiece, FunctionName, Tool, ToolCall


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` says nothing new: calls that must be made follow their schema always, and others are the model's."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Function


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    name: FunctionName


class Choice(msgspec.Struct, forbid_unknown_fields=True):
    """The one function to call."""

    type: Literal["function"]
    function: _Named


class _Called(msgspec.Struct, forbid_unknown_fields=True):
    name: FunctionName
    arguments: str


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """A call that an earlier answer made. `index` is for streams, and some clients send it back."""

    id: CallId
    function: _Called
    type: Literal["function"] = "function"
    index: int | None = None

    def plain(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


class _Schema(msgspec.Struct, forbid_unknown_fields=True):
    """The answer follows the schema, `strict` or not; what cannot be followed is refused."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


def tools(
    offered: Sequence[FunctionTool], choice: Literal["none", "auto", "required"] | Choice, parallel: bool | None
) -> dict[str, Any]:
    """The fields of a GenerateRequest. Raises ApiError."""
    names = [tool.function.name for tool in offered]
    if isinstance(choice, Choice):
        must = [choice.function.name]
        if must[0] not in names:
            raise ApiError(400, f"there is no tool {must[0]!r} to choose.", "invalid_value", "tool_choice")
    else:
        must = names if choice == "required" else []
        if choice == "required" and not names:
            raise ApiError(400, "there are no tools to choose from.", "invalid_value", "tool_choice")
    if choice == "none" or not offered:  # the model is not tempted
        return {}
    plain = [Tool(f.name, f.description or "", f.parameters or {}) for f in (tool.function for tool in offered)]
    # One function that is named is called once.
    return {
        "tools": plain,
        "must_call": must,
        "parallel_calls": parallel is not False and not isinstance(choice, Choice),
    }


def schema(wanted: Format | None) -> dict[str, Any] | None:
    """The schema that an answer has to follow, if any. Raises ApiError."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        path = "response_format.json_schema" + ("" if wanted.json_schema is None else ".schema")
        raise ApiError(400, f"Missing required parameter: '{path}'.", "missing_required_parameter", path)
    return wanted.json_schema.schema


def pieces(calls: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """As streams word them. An event has each call once: LangChain, which adds events up, loses a second piece."""
    worded: dict[int, dict[str, Any]] = {}
    for piece in calls:
        if (known := worded.get(piece.index)) is not None:
            known["function"]["arguments"] += piece.arguments
            continue
        begin = {} if piece.id is None else {"id": piece.id, "type": "function"}
        name = {} if piece.name is None else {"name": piece.name}
        worded[piece.index] = {"index": piece.index, **begin, "function": {**name, "arguments": piece.arguments}}
    return list(worded.values())


def made(calls: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """As whole answers word them."""
    whole: dict[int, dict[str, Any]] = {}
    for piece in calls:
        if piece.id is not None:
            whole[piece.index] = {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        whole[piece.index]["function"]["arguments"] += piece.arguments
    return list(whole.values())
