"""Serve the edge's API over HTTP in a thread beside the worker."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sliplm.edge.worker import EdgeWorker
from sliplm.errors import LinkError

if TYPE_CHECKING:
    import uvicorn

HEAD_START = 0.5
"""So many seconds the worker has to connect before the API is imported, which would take the interpreter from it.
Clients wait meanwhile: the address is bound."""

_log = logging.getLogger(__name__)


class ApiServer:
    """The API of `worker` on `host`:`port` (0: any free port, see `address`), from now until `close`, for clients
    that send `api_key` if there is one; `names`: others by which they reach it, `origins`: of web pages that may ask,
    see `guard`; `failed` is called if it cannot go on.

    Raises LinkError if the address cannot be used.
    """

    def __init__(
        self,
        worker: EdgeWorker,
        host: str,
        port: int,
        api_key: str | None = None,
        names: Sequence[str] = (),
        origins: Sequence[str] = (),
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise LinkError(f"the API cannot listen on {host}:{port}: {error.strerror or error}.") from None
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(self.address[0]).is_loopback:
            _log.warning("the API has no key, and other machines can reach it: see --api-key")
        self._worker, self._options = worker, (host, api_key, worker.counters, names, origins)
        self._server: uvicorn.Server | None = None
        self._closing, self._failed = False, failed
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.connected.wait(HEAD_START)
            self._server = self._make()
            if not self._closing:
                self._server.run(sockets=[self._socket])
        except BaseException:
            _log.exception("the API stopped")
            self._socket.close()  # its clients would wait for ever
            self._failed()

    def _make(self) -> uvicorn.Server:
        import uvicorn

        from sliplm.edge.api import create_app

        worker = self._worker
        app = create_app(
            worker.generate,
            lambda: worker.model_name,
            worker.connected.is_set,
            *self._options,
            failure=lambda: worker.failure,
        )
        # Access logs would name what people ask; the worker's own log has what an operator needs.
        return uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        )

    def close(self) -> None:
        self._closing = True
        if self._server:
            self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
