"""The ASGI application.

    GET  /v1/models[/NAME]   POST /v1/chat/completions   POST /v1/completions
    GET  /   /healthz   /readyz   /metrics

Requests go to the trusted side and text comes back; nothing is kept. A client that hangs up cancels its
generations.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sliplm.edge.api import page
from sliplm.edge.api.answers import Answer
from sliplm.edge.api.bodies import Body, ChatBody, CompletionBody, decode
from sliplm.edge.api.errors import ApiError, translate
from sliplm.edge.api.generations import NOTHING_YET, Choices, Generate, Room
from sliplm.edge.api.guard import KeyOnly, OwnNamesOnly
from sliplm.edge.api.metrics import Measured, Metrics
from sliplm.edge.connection import WorkCounters
from sliplm.errors import LinkError, SlipError
from sliplm.protocol.frames import MAX_JSON_BYTES
from sliplm.protocol.messages import CallPiece, TokenLogprob

B = TypeVar("B", bound=Body)

EARLY_SECONDS = 10.0
"""So long a stream that has no text yet waits for an error, which would have a status code of its own."""

BEAT_SECONDS = 10.0
"""A stream without text gets a comment as often: proxies and clients give up what is silent for a minute."""

NOT_REACHED = "the trusted side, which knows the model's name, has not been reached yet: try again later"

_COMMENT = b": still at it\n\n"
_CROSS_ORIGIN: dict[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("*",),  # clients add headers of their own; none of them says more than the key
    "expose_headers": ("retry-after", "x-should-retry"),
    "allow_private_network": True,  # a page from the internet, an API on this machine
}

_BREAKS = [(c.encode(), f"\\u{ord(c):04x}".encode()) for c in "\x85\u2028\u2029"]
"""Some clients, httpx among them, take these for ends of lines. In JSON they occur in strings only."""


def create_app(
    generate: Generate,
    model_name: Callable[[], str | None] = lambda: "slip",
    connected: Callable[[], bool] = lambda: True,
    host: str = "localhost",
    api_key: str | None = None,
    work: WorkCounters | None = None,
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
    failure: Callable[[], SlipError | None] = lambda: None,
) -> Starlette:
    """The application. `generate` starts a generation, `model_name` is what /v1/models lists (None: not known yet),
    `connected` tells whether the worker is, `host` is what the API is bound to, `names` are others by which it is
    reached, `origins` are those of other web pages that may ask, `api_key` is what clients must send if there is one,
    `work` holds the worker's counters, and `failure` tells why the trusted side was not reached, if that is known:
    `create_app(worker.generate, lambda: worker.model_name, worker.connected.is_set, "127.0.0.1", None,
    worker.counters)`."""
    started = int(time.time())
    metrics = Metrics(connected, work)
    rooms: list[Room] = []  # one, made inside the event loop

    def model() -> dict[str, Any]:
        if (name := model_name()) is None:
            # Translated, as it was raised before: whoever raises one error again and again makes its traceback longer.
            raise translate(failure() or LinkError(NOT_REACHED))
        return {"id": name, "object": "model", "created": started, "owned_by": "sliplm"}

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        known = model()
        _check_model(request.path_params["name"], known["id"])
        return _json(known)

    async def health(_: Request) -> Response:
        return _json({"status": "ok", "connected": connected()})

    async def ready(_: Request) -> Response:
        up = connected()
        return _json({"status": "ok" if up else "unavailable", "connected": up}, 200 if up else 503)

    async def show_metrics(_: Request) -> Response:
        return metrics.response()

    async def chat(request: Request) -> Response:
        return await answer(request, await _body(request, ChatBody), chat=True)

    async def completions(request: Request) -> Response:
        return await answer(request, await _body(request, CompletionBody), chat=False)

    async def answer(request: Request, body: Body, chat: bool) -> Response:
        served = model_name()
        if body.model is not None and served is not None:
            _check_model(body.model, served)
        wanted = body.requests()
        if not rooms:
            rooms.append(Room())
        rooms[0].check()
        worded = Answer(chat, served or body.model or "", len(wanted), len(wanted) // (body.n or 1), body.with_usage)
        choices = Choices(generate, wanted, rooms[0], metrics)
        if not body.stream:
            whole = await _unless_disconnected(request, choices, lambda: _collect(choices, worded))
            choices.close()
            return _json(whole)
        # Errors before the first chunk still get a status code of their own, if they come soon.
        first = await _unless_disconnected(request, choices, lambda: choices.next(EARLY_SECONDS))
        return _EventStream(choices, _events(choices, first, worded, metrics))

    async def on_error(_: Request, error: Exception) -> Response:
        problem = translate(error)
        metrics.errors.labels(problem.code).inc()
        return problem.response()

    async def on_hang_up(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; without it, the server would log a traceback

    async def not_found(_: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = "this address takes another method" if status == 405 else "there is nothing at this address"
        return ApiError(status, what, "not_found").response()

    routes = [
        Route("/", page.show),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/metrics", show_metrics),
    ]
    middleware = [
        Middleware(Measured, metrics=metrics, routes=frozenset(r.path for r in routes)),
        # A key is enough: no browser adds it by itself to what another page asks for.
        Middleware(OwnNamesOnly, host=host, given=names, origins=origins)
        if api_key is None
        else Middleware(KeyOnly, key=api_key),
    ]
    if origins:  # before the guard: browsers ask for leave without a key, and read a refusal only if it lets them
        middleware.insert(1, Middleware(CORSMiddleware, allow_origins=origins, **_CROSS_ORIGIN))
    handlers = {404: not_found, 405: not_found, 500: on_error, ClientDisconnect: on_hang_up}
    for kind in (SlipError, ApiError):
        handlers[kind] = on_error
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(404, f"there is no model {asked!r} here, only {served!r}", "model_not_found", "model")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _event(value: Any) -> bytes:
    data = msgspec.json.encode(value)
    for raw, escaped in _BREAKS:
        data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"


async def _body(request: Request, kind: type[B]) -> B:
    # A browser cannot send this type to another origin without asking first, and leave is given to `origins` alone.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request with Content-Type: application/json", "unsupported_media_type")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_JSON_BYTES:
            raise ApiError(413, f"the request exceeds {MAX_JSON_BYTES} bytes", "request_too_large")
    return decode(bytes(data), kind)


async def _collect(choices: Choices, worded: Answer) -> Any:
    texts = [""] * len(choices.last)
    logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
    calls: list[list[CallPiece]] = [[] for _ in texts]
    while (item := await choices.next()) is not None:
        index, chunk = item
        texts[index] += chunk.text
        logprobs[index] += chunk.logprobs
        calls[index] += chunk.calls
    return worded.whole(texts, logprobs, calls, choices.last)


class _EventStream(StreamingResponse):
    """Closes the generations whatever happens, even if the client is gone before the first event."""

    def __init__(self, choices: Choices, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.close()


async def _unless_disconnected(request: Request, choices: Choices, work: Callable[[], Awaitable[Any]]) -> Any:
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
    choices.close()
    raise translate(failure[0]) if failure else ClientDisconnect()


async def _events(choices: Choices, item: Any, worded: Answer, metrics: Metrics) -> AsyncIterator[bytes]:
    """Server-sent events. An error ends them without [DONE]: a cut text must not pass for a whole one."""
    try:
        while item is not None:
            yield _COMMENT if item is NOTHING_YET else _event(worded.piece(*item))
            item = await choices.next(BEAT_SECONDS)
        if (last := worded.last_piece(choices.last)) is not None:
            yield _event(last)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        problem = translate(error)
        metrics.errors.labels(problem.code).inc()
        yield _event(problem.body)
