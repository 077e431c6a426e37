"""`slip bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit, err, out, set_up_logging
from sliplm.cli.quiet import quiet_transformers


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="A directory, .gguf file or hub id; smollm2; llama-1.1b for random weights of that shape."),
    ] = None,
    planes: Annotated[list[int] | None, typer.Option(min=1, max=2, help="May be given twice; both if absent.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=8, help="Decoded tokens per round.")] = 48,
    prefill: Annotated[int, typer.Option(min=0, help="Tokens of the long prompt; 0 leaves it out.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often everybody has a turn.")] = 3,
    long: Annotated[int, typer.Option(min=0, help="Then decode so many more tokens, and see if memory grows.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep the bundles here, and take them from here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.svg, .png) here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the protected model beside the unprotected one: speed, traffic, memory, and where the time goes."""
    set_up_logging(False)
    quiet_transformers()
    from sliplm.speed import show
    from sliplm.speed.bench import bench as run

    if plot:
        show.require_plots()
    result = run(
        models or ["smollm2", "llama-1.1b"], planes or [1, 2], rank, tokens, prefill, rounds, long, keep,
        lambda line: err().print(line, markup=False),
    )  # fmt: skip
    if plot:
        show.plot(result, plot)
    if as_json:
        emit(True, result, "")
    else:
        show.tables(result, out())
