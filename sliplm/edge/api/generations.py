"""Blocking generations, used from an event loop: the choices of one HTTP request, side by side."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import anyio
import anyio.to_thread

from sliplm.edge.api.metrics import Metrics
from sliplm.errors import BusyError, LinkError
from sliplm.protocol.messages import Chunk, GenerateRequest

MAX_GENERATIONS = 6
"""As many generations are at the trusted side at once, and more wait here. It allows one device 8, of which some may
be cancelled ones that it has not noticed yet."""

MAX_WAITING = 64
"""As many generations wait here; whoever wants more comes again later."""

MAX_THREADS = 32
"""As many threads wait for text, or for the end of what nobody waits for any more."""

NOTHING_YET = (-1, Chunk(""))

Generate = Callable[[GenerateRequest], Iterator[Chunk]]
"""Starts a generation. If the iterator has a `close`, it cancels, from any thread."""


class Room:
    """Limits of one API; made inside the event loop, which they belong to."""

    def __init__(self) -> None:
        self.slots = anyio.CapacityLimiter(MAX_GENERATIONS)
        self.threads = anyio.CapacityLimiter(MAX_THREADS)

    def check(self) -> None:
        """Raises BusyError if too many wait already."""
        if self.slots.statistics().tasks_waiting >= MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} generations are waiting already: try again later.")


class Choices:
    """The generations of one HTTP request. `next` merges their chunks; `close` cancels what still runs."""

    def __init__(self, generate: Generate, requests: Sequence[GenerateRequest], room: Room, metrics: Metrics) -> None:
        self.last: list[Chunk] = [Chunk("")] * len(requests)  # by choice, with the totals so far
        self._metrics, self._start = metrics, time.monotonic()
        self._streams = [_Stream(generate, request, room) for request in requests]
        self._begun, self._unfinished = False, len(requests)
        self._ready: asyncio.Queue[tuple[int, Chunk] | Exception] = asyncio.Queue(2 * len(requests))
        self._tasks: list[asyncio.Task[None]] = []

    async def next(self, patience: float = math.inf) -> tuple[int, Chunk] | None:
        """A choice's index and its next text, None after the end of all, or NOTHING_YET after `patience` seconds.
        Raises what any of them raises."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._pump(i, s)) for i, s in enumerate(self._streams)]
        if not self._unfinished:
            return None
        item: tuple[int, Chunk] | Exception = NOTHING_YET
        with anyio.move_on_after(patience):
            item = await self._ready.get()
        if item is NOTHING_YET:
            return NOTHING_YET
        if isinstance(item, Exception):
            raise item
        self._count(*item)
        return item

    def _count(self, index: int, chunk: Chunk) -> None:
        metrics, before = self._metrics, self.last[index]
        if not self._begun:
            self._begun = True
            metrics.first_token.observe(time.monotonic() - self._start)
        metrics.tokens.labels("prompt").inc(max(0, chunk.prompt_tokens - before.prompt_tokens))
        metrics.tokens.labels("completion").inc(max(0, chunk.completion_tokens - before.completion_tokens))
        self.last[index] = chunk
        if chunk.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                metrics.seconds.observe(time.monotonic() - self._start)

    async def _pump(self, index: int, stream: _Stream) -> None:
        try:
            while True:
                chunk = await stream.next()
                await self._ready.put((index, chunk))
                if chunk.finish_reason is not None:
                    return
        except Exception as error:
            await self._ready.put(error)
        finally:
            stream.close()

    def close(self) -> None:
        """From the event loop; may be called twice."""
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.close()


class _Stream:
    """One generation: waits happen in threads, which `close` wakes up."""

    def __init__(self, generate: Generate, request: GenerateRequest, room: Room) -> None:
        self._generate = generate
        self._request = request
        self._room = room
        self._admitted = False
        self._lock = threading.Lock()
        self._chunks: Iterator[Chunk] | None = None
        self._closed = False

    async def next(self) -> Chunk:
        """The next text. Raises LinkError if the generation ended without a finish reason."""
        if not self._admitted:
            await self._room.slots.acquire_on_behalf_of(self)
            self._admitted = True
        while True:  # an empty chunk only says that the generation goes on
            chunk = await anyio.to_thread.run_sync(self._next, abandon_on_cancel=True, limiter=self._room.threads)
            if chunk.text or chunk.calls or chunk.logprobs or chunk.finish_reason is not None:
                return chunk

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
            self._room.slots.release_on_behalf_of(self)
        with self._lock:
            self._closed = True
            chunks = self._chunks
        if chunks is not None:
            _close(chunks)


def _close(chunks: Iterator[Chunk]) -> None:
    close = getattr(chunks, "close", None)
    if close is not None:
        with contextlib.suppress(ValueError):  # a plain generator that runs in another thread right now
            close()
