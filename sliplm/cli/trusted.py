"""`slip trusted`."""

from __future__ import annotations

import enum
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from sliplm.cli.common import Format, Json, LogFormat, RegistryUrl, emit, set_up_logging
from sliplm.cli.quiet import quiet_transformers


class Engine(enum.Enum):
    BUILTIN = "builtin"
    VLLM = "vllm"


def trusted(
    bundle: Annotated[Path, typer.Argument(help="DIR/trusted, as `slip split` wrote it.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges to connect to; port 0 takes a free one.")] = (
        "127.0.0.1:7411"
    ),
    name: Annotated[
        str | None, typer.Option(help="What the model is called; by default as the split or its directory says.")
    ] = None,
    pads: Annotated[
        str | None,
        typer.Option(
            help="Who makes one-time pads: self:DIR/edge, this process, from an edge bundle (the default); helpers, "
            "machines that connect for it; helpers:2, two of them for each pad."
        ),
    ] = None,
    stock: Annotated[
        int | None, typer.Option(min=0, help="Tokens for which to keep one-time pads ready; by default 64.")
    ] = None,
    pads_spill: Annotated[
        Path | None, typer.Option(help="A directory for the pads beyond 64, encrypted; they stay in memory if absent.")
    ] = None,
    fill_between: Annotated[
        str | None, typer.Option(help="Hours for making the pads beyond 64, as in 22:00-06:00; all hours if absent.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the trusted arithmetic; 0 takes all.")] = 0,
    engine: Annotated[
        Engine, typer.Option(help="What generates: builtin; or vllm, for many requests at a time (docs/serving.md).")
    ] = Engine.BUILTIN,
    drafts: Annotated[
        str,
        typer.Option(
            help="Who guesses tokens, so that one pass may give several: lookup, the text itself; none; or model:DIR, "
            "a small model with the same tokens, run here. Answers stay the same."
        ),
    ] = "lookup",
    allow_logprobs: Annotated[
        bool,
        typer.Option("--allow-logprobs", help="Let requests ask for log-probabilities: they help to copy a model."),
    ] = False,
    registry: RegistryUrl = None,
    concurrent: Annotated[
        int, typer.Option(min=0, help="Requests that one device generates at once; 0 for any number.")
    ] = 8,
    tokens_per_minute: Annotated[
        int, typer.Option(min=0, help="Tokens that one device may use in a minute; 0 without limit.")
    ] = 0,
    daily_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that one device may use in a day (UTC); 0 without limit.")
    ] = 0,
    rules: Annotated[
        str | None, typer.Option(help="Your rules for requests and answers: MODULE:OBJECT, or an entry point's name.")
    ] = None,
    system_prompt: Annotated[
        Path | None, typer.Option(help="Text that begins every chat; plain prompts are then refused.")
    ] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running requests have left at SIGTERM.")] = 30.0,
    metrics: Annotated[str, typer.Option(help="HOST:PORT for /metrics, /healthz and /readyz; none if absent.")] = "",
    log_format: LogFormat = Format.TEXT,
    as_json: Json = False,
) -> None:
    """Run the trusted side: it holds the secrets, generates, and sends the heavy arithmetic to edges.

    The first SIGTERM or interrupt lets running requests finish, the second ends them.
    """
    set_up_logging(True, log_format)
    # Threads of torch that wait for more work would take a core from an edge on the same machine. Read as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from sliplm._core import native
    from sliplm.protocol.connect import parse_address
    from sliplm.registry import Limits
    from sliplm.serve.monitor import Monitor, sample
    from sliplm.serve.rules import compose
    from sliplm.trusted.side import Trusted

    quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
        if native is not None:
            native.limit_threads(threads)
    monitor_address = parse_address(metrics) if metrics else None
    side = Trusted(
        bundle,
        listen,
        pads,
        stock,
        name,
        spill=pads_spill,
        fill_between=fill_between,
        allow_logprobs=allow_logprobs,
        registry=registry,
        limits=Limits(concurrent, tokens_per_minute, daily_tokens),
        rules=compose(rules, system_prompt),
        drafts=drafts,
        engine=engine.value,
    )

    def stop(*_: Any) -> None:
        if side.server.draining:
            side.server.close()
        else:
            side.server.drain(drain)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sample(side.server, side.model.slip)
    monitor = Monitor(side.server, *monitor_address) if monitor_address else None
    address = "{}:{}".format(*side.address)
    value: dict[str, Any] = {"listening": address, "model": side.engine.model_name()}
    if monitor:
        value["metrics"] = "http://{}:{}".format(*monitor.address)
    emit(as_json, value, f"listening on {address}")
    try:
        side.serve_forever()
    finally:
        if monitor:
            monitor.close()
