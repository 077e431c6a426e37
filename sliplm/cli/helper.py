"""`slip helper`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Format, Json, LogFormat, emit, set_up_logging


def helper(
    bundle: Annotated[Path, typer.Argument(help="DIR/edge, as `slip split` wrote it.")],
    trusted: Annotated[str, typer.Option(help="HOST:PORT of the trusted side.")],
    identity: Annotated[Path, typer.Option(help="The file that `slip device add --helper` wrote for this machine.")],
    log_format: LogFormat = Format.TEXT,
    as_json: Json = False,
) -> None:
    """Run a helper: it makes one-time pads ahead of time, for edges of other parties than its own."""
    set_up_logging(True, log_format)
    from sliplm.bundle import EdgeBundle

    opening = EdgeBundle.opening(bundle)  # its digest is computed while the rest is imported
    from sliplm import kernels
    from sliplm.edge.helper import Helper

    worker = Helper(opening, trusted, identity)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    said = f"making one-time pads for {trusted}; {kernels.describe()}"
    worker.once_connected(lambda: emit(as_json, {"trusted": trusted, "kernels": kernels.describe()}, said))
    worker.run()
