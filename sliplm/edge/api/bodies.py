"""What clients send, and what is asked of the trusted side for it.

No parameter is ignored silently: it has its effect, or is known to have none here, or is refused by name. Of messages
and their parts, unknown keys are ignored, as OpenAI's service does: clients keep notes of their own there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from sliplm.edge.api.errors import ApiError
from sliplm.edge.api.tools import Call, Choice, Format, FunctionTool, schema, tools
from sliplm.protocol.messages import MAX_TOKENS, MAX_TOOLS, CallId, GenerateRequest, Message

MAX_CHOICES = 16
"""As many answers can one request have."""

_REFUSED: dict[str, tuple[list[Any], str]] = {
    "audio": ([], "this model speaks text only"),
    "echo": ([False], "the answer does not repeat the prompt"),
    "function_call": (["none", "auto"], "its successor is 'tool_choice'"),
    "functions": ([[]], "their successor is 'tools'"),
    "logit_bias": ([{}], "this side does not know the model's tokens"),
    "modalities": ([["text"]], "this model speaks text only"),
    "prediction": ([], "there are no predicted outputs here"),
    "reasoning_effort": ([], "this model has no such setting"),
    "service_tier": (["auto", "default"], "there is one tier of service"),
    "store": ([False], "nothing is stored here"),
    "suffix": ([""], "this model continues text and does not fill gaps"),
    "verbosity": (["medium"], "this model has no such setting"),
    "web_search_options": ([], "there is no web search here"),
}
"""OpenAI's parameters that are refused: the values, besides null, that ask for nothing special; and why."""

T = TypeVar("T")
B = TypeVar("B", bound="Body")


class _TextPart(msgspec.Struct):
    type: Literal["text"]
    text: str


class _ChatMessage(msgspec.Struct):
    """Clients send answers back as they got them, so the empty fields of answers are accepted, and so is whatever they
    or other services added. Refused are those keys alone whose content this model would have to read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Call], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None

    def plain(self) -> Message:
        """Raises ApiError."""
        if self.content is None and self.role != "assistant":
            raise ApiError(400, "a message has no content.", "invalid_value", "messages")
        if (self.role == "tool") != (self.tool_call_id is not None):
            sentence = "a message of role 'tool', and only such a one, has a 'tool_call_id'."
            raise ApiError(400, sentence, "invalid_value", "messages")
        if self.tool_calls and self.role != "assistant":
            raise ApiError(400, "only an assistant's message has 'tool_calls'.", "invalid_value", "messages")
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        calls = [call.plain() for call in self.tool_calls or []]
        return Message("system" if self.role == "developer" else self.role, text, calls, self.tool_call_id)


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take. Ranges that the trusted side checks too are those of GenerateRequest."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    # Notes for OpenAI's own records, which nobody keeps here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Accepted only where they ask for nothing: see _REFUSED.
    logit_bias: Any = None
    store: bool | None = None
    service_tier: Any = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def requests(self) -> list[GenerateRequest]:
        """One request per choice, in order. Raises ApiError."""
        for name, (harmless, why) in _REFUSED.items():
            value = getattr(self, name, None)
            if value is not None and value not in harmless:
                raise ApiError(400, f"'{name}' is not supported: {why}.", "unsupported_parameter", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' is for streams only.", "invalid_value", "stream_options")
        return [self._request(prompt, i) for prompt in self._prompts() for i in range(self.n or 1)]

    def _prompts(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _request(self, prompt: dict[str, Any], choice: int) -> GenerateRequest:
        """Absent fields have OpenAI's defaults, except that 256 tokens of plain text are generated and not 16."""
        temperature = 1.0 if self.temperature is None else self.temperature
        # What is meant by a temperature of next to nothing, or by a share of nothing, is the likeliest token.
        greedy = 0 <= temperature < 0.01 or self.top_p == 0
        fields: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if greedy else temperature,
            "top_p": None if greedy and self.top_p == 0 else self.top_p,
            "top_k": self.top_k,
            "seed": None if self.seed is None else _derive(self.seed, choice),
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logprobs": self._logprobs(),
            **prompt,
        }
        given = {k: v for k, v in fields.items() if v is not None}
        return _valid(lambda: msgspec.convert(given, GenerateRequest))


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Format | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    verbosity: Any = None
    web_search_options: Any = None

    def _prompts(self) -> list[dict[str, Any]]:
        prompt: dict[str, Any] = {
            "messages": [m.plain() for m in self.messages],
            **tools(self.tools or [], self.tool_choice or "auto", self.parallel_tool_calls),
            "schema": schema(self.response_format),
        }
        if self.max_tokens is None:
            prompt["max_tokens"] = MAX_TOKENS
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                sentence = "'max_tokens' and 'max_completion_tokens' name different numbers: give one of them."
                raise ApiError(400, sentence, "invalid_value", "max_tokens")
            prompt["max_tokens"] = self.max_completion_tokens
        return [prompt]

    def _logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", "invalid_value", "top_logprobs")
        return None


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str]
    logprobs: int | None = None

    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def _prompts(self) -> list[dict[str, Any]]:
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if self.best_of not in (None, self.n or 1):
            sentence = "'best_of' is not supported: ask for n answers, and choose."
            raise ApiError(400, sentence, "unsupported_parameter", "best_of")
        if not 1 <= len(prompts) * (self.n or 1) <= MAX_CHOICES:
            raise ApiError(400, f"a request has 1 to {MAX_CHOICES} answers in all.", "invalid_value", "prompt")
        return [{"prompt": p} for p in prompts]

    def _logprobs(self) -> int | None:
        return self.logprobs


def decode(data: bytes, kind: type[B]) -> B:
    """Raises ApiError, which names the parameter that is wrong."""
    return _valid(lambda: msgspec.json.decode(data, type=kind))


def _derive(seed: int, choice: int) -> int:
    """The seed of choice number `choice`; the first has the request's own, as if it were the only one."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "little") >> 1


def _valid(make: Callable[[], T]) -> T:
    try:
        return make()
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError(400, "the request's body is not valid JSON.", "invalid_json") from None


def _named(error: str) -> ApiError:
    """What msgspec found, in OpenAI's words."""
    what, _, path = error.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if found := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what):
        param = f"{path}.{found[2]}" if path else found[2]
        if found[1].startswith("missing"):
            return ApiError(400, f"Missing required parameter: '{param}'.", "missing_required_parameter", param)
        return ApiError(400, f"Unknown parameter: '{param}'.", "unknown_parameter", param)
    if not path:
        return ApiError(400, f"the request is not valid: {what}.", "invalid_value")
    return ApiError(400, f"Invalid value for '{path}': {what}.", "invalid_value", path)
