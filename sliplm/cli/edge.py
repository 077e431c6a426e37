"""`slip edge`."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Format, Json, LogFormat, emit, set_up_logging
from sliplm.errors import SlipError


def edge(
    bundle: Annotated[Path, typer.Argument(help="DIR/edge, as `slip split` wrote it.")],
    trusted: Annotated[str, typer.Option(help="HOST:PORT of the trusted side.")],
    identity: Annotated[Path, typer.Option(help="The file that `slip device add` wrote for this machine.")],
    api: Annotated[str, typer.Option(help="HOST:PORT for the local OpenAI-compatible API; empty for none.")] = (
        "127.0.0.1:8411"
    ),
    api_key: Annotated[Path | None, typer.Option(help="A file with a key that the API's clients must send.")] = None,
    api_name: Annotated[
        list[str] | None,
        typer.Option(help="A further name by which clients reach the API, of a proxy or a container; repeatable."),
    ] = None,
    api_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin, such as https://app.example.com, that may use the API; repeatable."),
    ] = None,
    caches: Annotated[int, typer.Option(min=1, help="With open blocks: requests that may have a cache here.")] = 64,
    cache_memory: Annotated[int, typer.Option(min=1, help="With open blocks: MB that all caches may take.")] = 4096,
    log_format: LogFormat = Format.TEXT,
    as_json: Json = False,
) -> None:
    """Run the edge: it multiplies for the trusted side, and serves its answers as an API on this machine."""
    set_up_logging(True, log_format)
    from sliplm.bundle import EdgeBundle

    opening = EdgeBundle.opening(bundle)  # its digest is computed while the rest is imported
    from sliplm import kernels
    from sliplm.edge.open import CacheLimits
    from sliplm.edge.options import read_key, read_name, read_origin
    from sliplm.edge.serve import ApiServer
    from sliplm.edge.side import Edge
    from sliplm.protocol.connect import parse_address

    address = parse_address(api) if api else None
    key = read_key(api_key) if api_key else None
    names = [read_name(text) for text in api_name or ()]
    origins = [read_origin(text) for text in api_origin or ()]
    worker = Edge(opening, trusted, identity, CacheLimits(caches, cache_memory << 20))
    stop = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            worker.run()
        except BaseException as error:
            failure.append(error)
        stop.set()

    def api_failed() -> None:
        failure.append(SlipError("the API stopped; the log says why."))
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=work, name="worker", daemon=True)
    server = ApiServer(worker, *address, key, names, origins, api_failed) if address else None
    try:
        thread.start()
        while not stop.is_set() and not worker.connected.wait(0.1):
            pass
        if not stop.is_set():
            url = None
            if server:
                host, port = server.address
                url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            where = f"; API at {url}/v1" if url else ""
            emit(
                as_json,
                {"trusted": trusted, "api": url, "kernels": kernels.describe()},
                f"connected to {trusted}{where}; {kernels.describe()}",
            )
        stop.wait()
    finally:
        worker.stop()
        if server:
            server.close()
        thread.join(10)
    if failure:
        raise failure[0]
