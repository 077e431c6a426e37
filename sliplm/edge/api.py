"""The API on the customer's machine: the part of OpenAI's that one model and plain text need.

    GET  /v1/models     POST /v1/chat/completions     POST /v1/completions     GET /healthz

Requests go to the trusted side and text comes back; nothing is kept. A client that hangs up cancels its
generation. Source of the formats: OpenAI's API reference (Chat, Completions, Errors).
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import anyio
import anyio.to_thread
import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sliplm.errors import LinkError, SlipError, VerificationError
from sliplm.protocol.frames import MAX_JSON_BYTES
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, RequestError

MAX_GENERATIONS = 6
"""As many requests are at the trusted side at once, and more wait here. It allows one device 8, of which some may be
cancelled ones that it has not noticed yet."""

MAX_THREADS = 32
"""As many threads wait for text, or for the end of what nobody waits for any more."""

Generate = Callable[[GenerateRequest], Iterator[Chunk]]
"""Starts a generation. If the iterator has a `close`, it cancels, from any thread."""

T = TypeVar("T")


# --- what clients send --------------------------------------------------------------------------------------


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take. Fields that clients like to send are listed even where only their default is
    possible: silently ignoring one would give an answer that was not asked for."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=0)] | None = None
    user: str | UnsetType | None = UNSET

    def request(self, **what: Any) -> GenerateRequest:
        """Absent fields have OpenAI's defaults, except that 256 tokens are generated."""
        fields: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            **what,
        }
        return _valid(lambda: msgspec.convert({k: v for k, v in fields.items() if v is not None}, GenerateRequest))


class ChatBody(_Body, kw_only=True):
    messages: Annotated[list[_ChatMessage], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: Literal[False] | None = None


class CompletionBody(_Body, kw_only=True):
    prompt: str
    echo: bool | None = None


# --- what clients get ---------------------------------------------------------------------------------------


class _Style:
    """How one endpoint words its answers."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat = chat
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, last: Chunk) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self.head, "choices": [self._choice(said, last.finish_reason)], "usage": _usage(last)}

    def piece(self, chunk: Chunk, first: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"text": chunk.text}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            said = {"delta": {**role, "content": chunk.text}}
        return self._streamed([self._choice(said, chunk.finish_reason)])

    def usage(self, last: Chunk) -> dict[str, Any]:
        return {**self._streamed([]), "usage": _usage(last)}

    def _streamed(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    @staticmethod
    def _choice(said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}


def _usage(last: Chunk) -> dict[str, int]:
    total = last.prompt_tokens + last.completion_tokens
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": total,
    }


class _ApiError(Exception):
    def __init__(self, status: int, message: str, code: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _translate(error: Exception) -> _ApiError:
    match error:
        case _ApiError():
            return error
        case RequestError():
            return _ApiError(400, str(error), "invalid_request")
        case VerificationError():
            return _ApiError(502, str(error), "verification_failed")
        case LinkError():
            return _ApiError(503, str(error), "trusted_unavailable")
        case SlipError():
            return _ApiError(503, str(error), "refused")
        case _:
            return _ApiError(500, "the edge failed to handle this request", "internal_error")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _valid(decode: Callable[[], T]) -> T:
    try:
        return decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the request is not valid: {error}") from None


# --- the application ----------------------------------------------------------------------------------------


def create_app(
    generate: Generate,
    model_name: Callable[[], str] = lambda: "slip",
    connected: Callable[[], bool] = lambda: True,
    host: str = "localhost",
) -> Starlette:
    """The ASGI application. `generate` starts a generation, `model_name` is what /v1/models lists,
    `connected` tells whether the worker is, and `host` is what the API is bound to: `create_app(worker.generate,
    lambda: worker.model_name, worker.connected.is_set, "127.0.0.1")`."""
    started = int(time.time())
    limits: list[anyio.CapacityLimiter] = []  # made inside the event loop, which they belong to

    async def models(_: Request) -> Response:
        entry = {"id": model_name(), "object": "model", "created": started, "owned_by": "sliplm"}
        return _json({"object": "list", "data": [entry]})

    async def health(_: Request) -> Response:
        up = connected()
        return _json({"status": "ok" if up else "unavailable", "connected": up}, 200 if up else 503)

    async def chat(request: Request) -> Response:
        body = await _body(request, ChatBody)
        what: dict[str, Any] = {"messages": [m.plain() for m in body.messages]}
        if body.max_completion_tokens is not None:
            what["max_tokens"] = body.max_completion_tokens
        return await answer(request, body, body.request(**what), chat=True)

    async def completions(request: Request) -> Response:
        body = await _body(request, CompletionBody)
        if body.echo:
            raise RequestError("echo is not supported")
        return await answer(request, body, body.request(prompt=body.prompt), chat=False)

    async def answer(request: Request, body: _Body, wanted: GenerateRequest, chat: bool) -> Response:
        model = model_name()
        if body.model not in (None, model):
            raise _ApiError(404, f"there is no model {body.model!r} here, only {model!r}", "model_not_found")
        if not limits:
            limits.extend(map(anyio.CapacityLimiter, (MAX_GENERATIONS, MAX_THREADS)))
        style = _Style(chat, model)
        stream = _Stream(generate, wanted, *limits)
        if not body.stream:
            text, last = await _unless_disconnected(request, stream, stream.collect)
            stream.close()
            return _json(style.whole(text, last))
        # Errors before the first chunk still get a status code of their own.
        first = await _unless_disconnected(request, stream, stream.next)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(stream, _events(stream, first, style, with_usage))

    async def on_error(_: Request, error: Exception) -> Response:
        problem = _translate(error)
        return _json(problem.body, problem.status)

    async def on_hang_up(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; without it, the server would log a traceback

    async def not_found(_: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = "this address takes another method" if status == 405 else "there is nothing at this address"
        return _json(_ApiError(status, what, "not_found").body, status)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/healthz", health),
        ],
        middleware=[Middleware(_OwnNamesOnly, host=host)],
        exception_handlers={
            SlipError: on_error,
            _ApiError: on_error,
            ClientDisconnect: on_hang_up,
            404: not_found,
            405: not_found,
            500: on_error,
        },
    )


class _OwnNamesOnly:
    """Refuses requests that were made for another name than this API's. Somebody's web page can let its own name
    point to this machine (DNS rebinding); the browser then takes the API for a part of that page, but still says
    in Host, and mostly in Origin, where it thinks it is. An address cannot be pointed elsewhere."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = {host.lower(), "localhost", "127.0.0.1", "::1"}
        address = _address(host)
        self._any_address = address is not None and address.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._refusal(Headers(scope=scope))):
            error = _ApiError(403, why, "forbidden")
            await _json(error.body, error.status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host = headers.get("host", "").lower()
        name = re.sub(r":\d*$", "", host).removeprefix("[").removesuffix("]")
        if name not in self._names and not (self._any_address and _address(name)):
            return "this API does not go by the name in the Host header: use the address that it listens on"
        if headers.get("origin", f"http://{host}").lower() != f"http://{host}":
            return "this API does not serve other web pages"
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


Body = TypeVar("Body", bound=_Body)


async def _body(request: Request, kind: type[Body]) -> Body:
    # A browser cannot send this type to another origin without asking first, and nobody here allows it.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _ApiError(415, "send the request with Content-Type: application/json", "unsupported_media_type")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_JSON_BYTES:
            raise _ApiError(413, f"the request exceeds {MAX_JSON_BYTES} bytes", "request_too_large")
    return _valid(lambda: msgspec.json.decode(bytes(data), type=kind))


class _Stream:
    """A blocking generation, used from an event loop: waits happen in threads, which `close` wakes up."""

    def __init__(
        self,
        generate: Generate,
        request: GenerateRequest,
        slots: anyio.CapacityLimiter,
        threads: anyio.CapacityLimiter,
    ) -> None:
        self._generate = generate
        self._request = request
        self._slots = slots
        self._threads = threads
        self._admitted = False
        self._lock = threading.Lock()
        self._chunks: Iterator[Chunk] | None = None
        self._closed = False

    async def next(self) -> Chunk:
        """The next text. Raises LinkError if the generation ended without a finish reason."""
        if not self._admitted:
            await self._slots.acquire_on_behalf_of(self)
            self._admitted = True
        while True:  # an empty chunk only says that the generation goes on
            chunk = await anyio.to_thread.run_sync(self._next, abandon_on_cancel=True, limiter=self._threads)
            if chunk.text or chunk.finish_reason is not None:
                return chunk

    async def collect(self) -> tuple[str, Chunk]:
        """The whole text, and the last chunk."""
        texts = []
        while True:
            chunk = await self.next()
            texts.append(chunk.text)
            if chunk.finish_reason is not None:
                return "".join(texts), chunk

    def _next(self) -> Chunk:
        if self._chunks is None:
            chunks = self._generate(self._request)
            with self._lock:
                self._chunks = chunks
                closed = self._closed
            if closed:  # cancelled while the connection was being made
                _close(chunks)
                raise LinkError("the request was cancelled")
        chunk = next(self._chunks, None)
        if chunk is None:
            raise LinkError("the generation ended early")
        return chunk

    def close(self) -> None:
        """Cancel, from the event loop; may be called twice."""
        if self._admitted:
            self._admitted = False
            self._slots.release_on_behalf_of(self)
        with self._lock:
            self._closed = True
            chunks = self._chunks
        if chunks is not None:
            _close(chunks)


class _EventStream(StreamingResponse):
    """Closes the generation whatever happens, even if the client is gone before the first event."""

    def __init__(self, stream: _Stream, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


def _close(chunks: Iterator[Chunk]) -> None:
    close = getattr(chunks, "close", None)
    if close is not None:
        with contextlib.suppress(ValueError):  # a plain generator that runs in another thread right now
            close()


async def _unless_disconnected(request: Request, stream: _Stream, work: Callable[[], Any]) -> Any:
    """`await work()`, given up when the client hangs up."""
    result: list[Any] = []
    failure: list[Exception] = []

    async def run() -> None:
        try:
            result.append(await work())
        except Exception as error:  # taken out by hand: a task group would wrap it in an ExceptionGroup
            failure.append(error)
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        while not result and not failure:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                break
        group.cancel_scope.cancel()
    if result:
        return result[0]
    stream.close()
    raise failure[0] if failure else ClientDisconnect()


async def _events(stream: _Stream, chunk: Chunk, style: _Style, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events. An error ends them without [DONE]: a cut text must not pass for a whole one."""
    try:
        first = True
        while True:
            yield _event(style.piece(chunk, first))
            if chunk.finish_reason is not None:
                break
            first = False
            chunk = await stream.next()
        if with_usage:
            yield _event(style.usage(chunk))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _event(_translate(error).body)
