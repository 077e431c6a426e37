"""`slip bench`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit, err, out, set_up_logging
from sliplm.cli.quiet import quiet_transformers
from sliplm.errors import SlipError


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="A directory, .gguf file or hub id; smollm2; llama-1.1b for random weights of that shape, "
            "llama-7b-block and llama-70b-block for one decoder block of those."
        ),
    ] = None,
    planes: Annotated[
        list[int] | None,
        typer.Option(min=1, max=2, help="May be given twice; both if absent, one with --streams or --drafts."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=8, help="Decoded tokens per round.")] = 48,
    prefill: Annotated[int, typer.Option(min=0, help="Tokens of the long prompt; 0 leaves it out.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often everybody has a turn.")] = 3,
    long: Annotated[int, typer.Option(min=0, help="Then decode so many more tokens, and see if memory grows.")] = 0,
    streams: Annotated[
        str | None,
        typer.Option(
            help="Measure leverage instead: decode so many sequences as one batch, such as 1,8,16, and compare the "
            "trusted side's CPU time for a token with the whole model's."
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also llama.cpp, in Q8_0 on the same shape.")] = False,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Measure what guessing tokens is worth instead, with one plane.")
    ] = False,
    rtt: Annotated[str, typer.Option(help="With --drafts: round-trip time to put between the sides.")] = "0ms",
    keep: Annotated[Path | None, typer.Option(help="Keep the bundles here, and take them from here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.svg, .png) here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the protected model beside the unprotected one: speed, traffic, memory, and where the time goes."""
    counts = _counts(streams) if streams is not None else []
    if counts and (peers or plot or long):
        raise SlipError("--streams measures leverage alone: leave out --peers, --plot and --long.")
    if drafts and (counts or peers or plot or long):
        raise SlipError("--drafts measures guesses alone: leave out --streams, --peers, --plot and --long.")
    if rtt != "0ms" and not drafts:
        raise SlipError("--rtt goes with --drafts.")
    set_up_logging(False)
    quiet_transformers()
    from sliplm.planner import units
    from sliplm.planner.costs import Network
    from sliplm.speed import show
    from sliplm.speed.bench import bench as run

    if plot:
        show.require_plots()
    usual = ["smollm2", "llama-1.1b", *(["llama-7b-block", "llama-70b-block"] if counts else [])]
    network = Network(units.duration(rtt)) if drafts else None
    usual = usual[:1] if drafts else usual  # the others have no words
    result = run(
        models or usual, planes or ([1] if counts or drafts else [1, 2]), rank, tokens, prefill, rounds, long, keep,
        lambda line: err().print(line, markup=False), streams=counts, with_peers=peers, drafts=network,
    )  # fmt: skip
    if plot:
        show.plot(result, plot)
    if as_json:
        emit(True, result, "")
    else:
        show.tables(result, out())


def _counts(text: str) -> list[int]:
    """The numbers of streams in `text`. Raises SlipError."""
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise SlipError(f"--streams {text[:200]!a} is not a list of numbers from 1 on, such as 1,8,16.")
    return [int(part) for part in text.split(",")]
