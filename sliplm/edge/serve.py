"""Serve the edge's API over HTTP in a thread beside the worker."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence

import uvicorn

from sliplm.edge.api import create_app
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import LinkError

_log = logging.getLogger(__name__)


class ApiServer:
    """The API of `worker` on `host`:`port` (0: any free port, see `address`), from now until `close`, for clients
    that send `api_key` if there is one; `names`: others by which they reach it, `origins`: of web pages that may ask,
    see `guard`.

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
    ) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise LinkError(f"the API cannot listen on {host}:{port}: {error.strerror or error}.") from None
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(self.address[0]).is_loopback:
            _log.warning("the API has no key, and other machines can reach it: see --api-key")
        app = create_app(
            worker.generate,
            lambda: worker.model_name,
            worker.connected.is_set,
            host,
            api_key,
            worker.counters,
            names,
            origins,
            lambda: worker.failure,
        )
        # Access logs would name what people ask; the worker's own log has what an operator needs.
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException:
            _log.exception("the API stopped")

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
