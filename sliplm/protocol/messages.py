"""The JSON messages of a REQUEST connection: what to generate, and the text that comes back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sliplm.errors import ProtocolError, RequestError
from sliplm.protocol.frames import MAX_JSON_BYTES

Count = Annotated[int, Meta(ge=0)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
FunctionName = Annotated[str, Meta(pattern=r"\A[a-zA-Z0-9_-]{1,64}\Z")]
CallId = Annotated[str, Meta(min_length=1, max_length=64)]

MAX_TOOLS = 128
"""As many functions can a request offer, as with OpenAI, and as many calls has a message."""

MAX_TOKENS = 1 << 20
"""Of an answer; the model's context ends it before."""

MAX_LOGPROBS = 20
"""As many most likely tokens can be asked for, as with OpenAI."""


class Tool(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A function that the model may call. `parameters` is the JSON Schema of its arguments, an object."""

    name: FunctionName
    description: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        return "Tool()"


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A call that the model made in an earlier turn. `arguments` is the text of a JSON object."""

    id: CallId
    name: FunctionName
    arguments: str

    def __repr__(self) -> str:
        return f"ToolCall({len(self.arguments)} characters)"


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """One turn of a chat. An assistant's may have `tool_calls`, and one of role `tool` is the result of the call that
    `tool_call_id` names."""

    role: Annotated[str, Meta(min_length=1, max_length=32)]
    content: str
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    tool_call_id: CallId | None = None

    def __repr__(self) -> str:  # a prompt is its author's business: keep it out of logs
        return f"Message(role={self.role!r}, {len(self.content)} characters)"


class GenerateRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True, kw_only=True):
    """What to generate. Exactly one of `prompt` (plain text) and `messages` (a chat) is given.

    `temperature` 0 is greedy; others are 0.01 or more, because logits are divided by it. `top_k` 0 and `top_p` 1
    switch these filters off. None for one of the three is what the model's own generation settings say, and without
    them 1, 1 and 0. `stop` lists texts that end the generation and are not part of it. The penalties lower
    the logits of tokens that the answer has already, per occurrence and once. `logprobs` asks for the
    log-probability of every token and for those of so many most likely ones.

    `tools` are functions that the model may call, more than one in an answer if `parallel_calls`, and `must_call` names
    those of which it has to call one. `schema` is a JSON Schema that an answer without calls follows. Ranges are
    checked when a request is decoded.
    """

    prompt: str | None = None
    messages: list[Message] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 256
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    stop: Annotated[list[StopText], Meta(max_length=16)] = msgspec.field(default_factory=list)
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    must_call: Annotated[list[FunctionName], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    parallel_calls: bool = True
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages, and not both")
        if self.messages is not None and not self.messages:
            raise ValueError("messages is empty")
        if self.temperature is not None and 0 < self.temperature < 0.01:
            raise ValueError("temperature is 0 (greedy) or at least 0.01")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if not set(self.must_call) <= set(names):
            raise ValueError("a function that must be called is none of the tools")
        if names and self.messages is None:
            raise ValueError("tools are for chats, not for a plain prompt")

    def __repr__(self) -> str:
        return f"GenerateRequest(max_tokens={self.max_tokens}, temperature={self.temperature})"


class TokenLogprob(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """The text of one generated token, its natural log-probability under the model before temperature and filters,
    and the most likely tokens in its place, likeliest first. A token with a part of a character has U+FFFD for it."""

    token: str
    logprob: float
    top: list[tuple[str, float]] = msgspec.field(default_factory=list)

    def __repr__(self) -> str:
        return f"TokenLogprob({len(self.top)} alternatives)"


class CallPiece(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A piece of the answer's call number `index`, from 0. The first of each call has its `id` and the function's
    `name`; the `arguments` of all, joined, are the text that the model wrote as arguments."""

    index: Count
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def __repr__(self) -> str:
        return f"CallPiece({self.index}, {len(self.arguments)} characters)"


class Chunk(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A piece of generated text. The last chunk, and only it, has a `finish_reason`; the counts are the
    totals so far. Of tokens that were guessed before the model said them, `accepted_tokens` are in the answer, so that
    it took as many passes fewer, and `rejected_tokens` were wrong. `logprobs` are those of the tokens that begin in
    this text, if the request asked for them; in an answer with `calls`, also those of the tokens that the calls are
    written with."""

    text: str
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    calls: list[CallPiece] = msgspec.field(default_factory=list)
    accepted_tokens: Count = 0
    rejected_tokens: Count = 0

    def __repr__(self) -> str:
        return f"Chunk({len(self.text)} characters, finish_reason={self.finish_reason!r})"


_encoder = msgspec.json.Encoder()
_request = msgspec.json.Decoder(GenerateRequest)
_chunk = msgspec.json.Decoder(Chunk)


def encode(message: GenerateRequest | Chunk) -> bytes:
    """`message` as JSON. Raises RequestError if it exceeds what one frame may carry."""
    try:
        data = _encoder.encode(message)
    except UnicodeEncodeError:  # a lone surrogate
        raise RequestError("the text is not valid Unicode") from None
    if len(data) > MAX_JSON_BYTES:
        raise RequestError(f"the request has {len(data)} bytes; at most {MAX_JSON_BYTES} are possible")
    return data


def decode_request(data: bytes) -> GenerateRequest:
    """Raises RequestError, with a sentence that names the offending field."""
    try:
        return _request.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the request is not valid: {error}") from None


def decode_chunk(data: bytes) -> Chunk:
    """Raises ProtocolError: only a faulty trusted side sends a malformed chunk."""
    try:
        return _chunk.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("the trusted side sent a malformed chunk of text") from None
