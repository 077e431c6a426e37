"""For whoever operates the trusted side: /metrics, /healthz and /readyz over plain HTTP.

Nothing here needs protection from readers on the operator's network, and nothing protects it: bind it to an address
that customers cannot reach.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import TYPE_CHECKING

from sliplm.errors import LinkError
from sliplm.serve.server import TrustedServer

if TYPE_CHECKING:
    from sliplm.trusted.runtime import Runtime


class Monitor:
    """Serves what `server` measures on `host`:`port` (0: any free port, see `address`), from now until `close`.

    /healthz is 200 while the process works at all, /readyz while it takes requests: not while it drains, nor while its
    registry does not answer. Raises LinkError if the address cannot be used.
    """

    def __init__(self, server: TrustedServer, host: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds for a request to arrive

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        self._answer(200, server.service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
                    case "/healthz":
                        self._answer(200, b'{"status":"ok"}\n')
                    case "/readyz":
                        ready = server.ready
                        self._answer(200 if ready else 503, b'{"ready":%s}\n' % str(ready).lower().encode())
                    case _:
                        self._answer(404, b'{"error":"there is nothing at this address"}\n')

            def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """A scrape every few seconds is no news."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = AF_INET6 if ":" in host else ThreadingHTTPServer.address_family

            def handle_error(self, *_: object) -> None:
                """A reader that hangs up is no news either."""

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise LinkError(f"the metrics cannot be served on {host}:{port}: {error.strerror or error}.") from None
        self.address: tuple[str, int] = self._server.server_address[:2]  # type: ignore[assignment]
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def sample(server: TrustedServer, slip: Runtime) -> None:
    """Let the server's metrics show what it and `slip`, the model's runtime, know at any time."""
    service, helpers, pool, counters, spent = server.service, server.helpers, slip.pool, slip.counters, slip.measure()
    edges = server.edges
    for name, what, value in (
        ("requests_waiting", "Requests waiting for their turn", lambda: service.queue.waiting),
        ("requests_generating", "Requests that have a slot of the engine", lambda: service.queue.running),
        ("edges_connected", "Live WORK connections", lambda: len(server.links())),
        ("devices_connected", "Devices with any connection", lambda: server.devices_connected),
        ("pads_ready", "Tokens for which every group has a one-time pad ready", lambda: pool.level),
        ("pads_ready_mean", "The same, averaged over groups", lambda: pool.mean_level),
        ("pads_target", "Tokens for which to keep them, at this hour", lambda: pool.target),
        ("pads_stored", "Tokens of those ready whose pads are on disk", lambda: pool.stored),
        ("pads_stored_bytes", "Bytes of pads on disk", lambda: pool.spill.size if pool.spill else 0),
        ("ready", "Whether /readyz says yes", lambda: server.ready),
    ):
        service.metrics.sample("gauge", f"slip_trusted_{name}", what, value)
    for name, what, read in (
        ("exchanges", "Exchanges with edges", lambda: counters.exchanges),
        ("exchange_rows", "Tokens in them", lambda: counters.rows),
        ("edge_rows", "The same, by the device whose edge computed them", lambda: dict(edges.rows)),
        ("exchanges_replaced", "Times that an edge failed and another was asked", lambda: edges.replaced),
        ("exchange_bytes", "Their payloads", lambda: {"sent": counters.sent, "received": counters.received}),
        ("pads_refused", "Times that pads were ready for others than an edge of their party", lambda: pool.refused),
        ("exchange_seconds", "From an input to its output", lambda: counters.exchange / 1e9),
        (
            "stage_seconds",
            "Time in the steps of exchanges; own work lies within link",
            lambda: {step: nanoseconds / 1e9 for step, nanoseconds in spent.items()},
        ),
    ):
        service.metrics.sample("counter", f"slip_trusted_{name}", what, read)
    if helpers is not None:
        of, name = service.metrics.sample, "slip_trusted_helper"
        of("gauge", f"{name}s_connected", "Live HELP connections", lambda: len(helpers.alive()))
        of("counter", f"{name}_images", "Images of pads from helpers, of a token and a group", lambda: helpers.made)
        of("counter", f"{name}_lies", "Wrong ones", lambda: helpers.lies)
