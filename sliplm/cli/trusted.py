"""`slip trusted`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit, quiet_transformers, set_up_logging


def trusted(
    bundle: Annotated[Path, typer.Argument(help="DIR/trusted, as `slip split` wrote it.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges to connect to; port 0 takes a free one.")] = (
        "127.0.0.1:7411"
    ),
    pads: Annotated[int, typer.Option(min=0, help="Tokens for which to keep one-time pads ready.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the model; 0 takes all.")] = 0,
    allow_logprobs: Annotated[
        bool,
        typer.Option("--allow-logprobs", help="Let requests ask for log-probabilities: they help to copy a model."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the trusted side: it holds the secrets, generates, and sends the heavy arithmetic to edges."""
    set_up_logging(True)
    import torch

    from sliplm.protocol.channel import parse_address
    from sliplm.trusted.engine import Engine
    from sliplm.trusted.server import TrustedServer

    quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
    host, port = parse_address(listen)
    engine = Engine(bundle, pads, allow_logprobs)
    server = TrustedServer(engine, engine.digest, engine.shapes, bundle / "authority", host, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.close())
    engine.model.slip.pool.start()
    address = "{}:{}".format(*server.address)
    emit(as_json, {"listening": address, "model": engine.model_name()}, f"listening on {address}")
    try:
        server.serve_forever()
    finally:
        engine.model.slip.pool.close()
