"""Edges and helpers of a model that vLLM holds: they connect to the process that holds it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol, TypeVar

from sliplm.engine.tools import Syntax
from sliplm.engine.vllm.settings import Settings
from sliplm.errors import LinkError, RequestError
from sliplm.exchange.link import Link, Router
from sliplm.naming import model_name
from sliplm.pads.keeping import Keeping
from sliplm.pads.sources import SelfSource, find_source
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.serve.server import TrustedServer
from sliplm.trusted.runtime import Runtime

AGAIN_SECONDS = 0.05
WAIT_SECONDS = 1.0
SAY_SECONDS = 30.0

ELSEWHERE = "vLLM serves this model: ask its API, not the edge's"

_log = logging.getLogger("vllm.sliplm")  # vLLM shows the logs below its own name
T = TypeVar("T")


class Runs(Protocol):
    """What brings exchanges to edges."""

    def run(self, compute: Callable[[], T]) -> T:
        """What `compute` returns, whose exchanges go to an edge. An edge that goes away or lies is replaced: what it
        began is done again, with fresh pads. Waits as long as there is none, since an exception would end vLLM's
        engine, and with it all requests."""
        ...


class _Elsewhere:
    """In the place of an engine: an edge's requests are told where to go."""

    capacity = 1
    shows = False

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def syntax(self) -> Syntax:
        raise RequestError(ELSEWHERE)

    def generate(self, request: GenerateRequest, link: Link | Router) -> Iterator[Chunk]:
        raise RequestError(ELSEWHERE)

    def model_name(self) -> str:
        return self._name


class Edges:
    """Listens for the edges and helpers of DIR/trusted, and makes pads, as the environment says (`Settings`), until the
    process ends. Raises SlipError if that cannot be."""

    def __init__(self, directory: Path, runtime: Runtime) -> None:
        settings = Settings.read(os.environ)
        Keeping(settings.stock).rule(runtime.pool)
        source = find_source(settings.pads, directory, runtime.digest)
        if isinstance(source, SelfSource):
            runtime.make_pads(source)
        work = None if isinstance(source, SelfSource) else runtime.take_helpers(source)
        self._runtime = runtime
        self._server = TrustedServer(
            _Elsewhere(model_name(directory)),
            runtime.digest,
            runtime.shapes,
            directory / "authority",
            *settings.listen,
            registry=settings.registry,
            pads=work,
            worker_wait=WAIT_SECONDS,
        )
        runtime.pool.start()
        threading.Thread(target=self._server.serve_forever, name="slip edges", daemon=True).start()
        _log.info("edges may connect to %s:%d", *self._server.address)

    def run(self, compute: Callable[[], T]) -> T:
        """See Runs. Who asked may give up at any time."""
        said = time.monotonic()
        while True:
            try:
                with self._runtime.using(self._server.edges):
                    return compute()
            except LinkError as error:
                if (now := time.monotonic()) > said:
                    _log.warning("requests wait: %s", error)
                    said = now + SAY_SECONDS
                time.sleep(AGAIN_SECONDS)


making: ContextVar[Callable[[Path, Runtime], Runs]] = ContextVar("making", default=Edges)
"""Of a model that is loaded in this context."""
