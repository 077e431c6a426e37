"""What `/metrics` tells Prometheus about an edge: counts and times, and nothing of what was asked or answered."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sliplm import kernels
from sliplm.edge.connection import WorkCounters

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_log = logging.getLogger(__name__)


class Metrics:
    """The metrics of one API and of the worker behind it, whose counters are read when somebody looks."""

    def __init__(self, connected: Callable[[], bool], work: WorkCounters | None = None) -> None:
        r = self._registry = CollectorRegistry()
        self.requests = Counter("slip_edge_requests", "HTTP requests", ["route", "status"], registry=r)
        self.in_progress = Gauge("slip_edge_requests_in_progress", "Requests for text being answered", registry=r)
        self.seconds = Histogram(
            "slip_edge_request_seconds", "Time of a whole request for text", buckets=SECONDS, registry=r
        )
        self.first_token = Histogram(
            "slip_edge_first_token_seconds", "Time to the first text of a request", buckets=SECONDS, registry=r
        )
        self.tokens = Counter("slip_edge_tokens", "Tokens read and generated", ["kind"], registry=r)
        self.errors = Counter(
            "slip_edge_errors", "Requests that failed, by the code of the error", ["code"], registry=r
        )
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)
        for code in ("verification_failed", "trusted_unavailable", "rate_limit_exceeded"):
            self.errors.labels(code)
        r.register(_Worker(connected, work or WorkCounters()))

    def response(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Worker:
    """The worker's plain counters, in Prometheus' terms."""

    def __init__(self, connected: Callable[[], bool], work: WorkCounters) -> None:
        self._connected, self._work = connected, work

    def collect(self) -> Iterator[Metric]:
        w = self._work
        yield GaugeMetricFamily("slip_edge_connected", "1 while the trusted side can use this edge", self._connected())
        for name, what, value in (
            (
                "connections",
                "Connections made to the trusted side as a worker; all but one are reconnects",
                w.connections,
            ),
            ("exchanges", "Matrix products served", w.exchanges),
            ("exchange_rows", "Vectors multiplied", w.rows),
            ("received_bytes", "Vectors received", w.received_bytes),
            ("sent_bytes", "Products sent", w.sent_bytes),
            ("compute_seconds", "Time spent multiplying", w.compute_ns / 1e9),
        ):
            yield CounterMetricFamily(f"slip_edge_{name}", what, value)
        info = GaugeMetricFamily("slip_edge_info", "Version and kernels of this edge", labels=["version", "kernels"])
        info.add_metric([version("sliplm"), kernels.describe()], 1)
        yield info


class Measured:
    """Counts every request by its route and status, and logs a line without its content."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.monotonic()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Whatever else is in an address was made up by the client: it is neither a label nor for the log.
        route = scope["path"] if scope["path"] in self._routes else "other"
        try:
            for_text = route.endswith("/completions")
            with self._metrics.in_progress.track_inprogress() if for_text else contextlib.nullcontext():
                await self._app(scope, receive, watch)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            seconds = time.monotonic() - start
            _log.debug("%s: status %d, %.3f s", route, status, seconds)
