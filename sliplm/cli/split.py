"""`slip split`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, Model, Planes, Rank, emit, err, progress_bar, set_up_logging
from sliplm.cli.quiet import quiet_transformers
from sliplm.errors import SlipError
from sliplm.planner import units
from sliplm.split.places import KINDS, places


def split(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the two bundles; must not exist.")],
    rank: Rank = 16,
    planes: Planes = 2,
    camouflage: Annotated[bool, typer.Option(help="Plant random components where the sensitive ones were.")] = True,
    blinding: Annotated[bool, typer.Option(help="Give every group a secret basis.")] = True,
    base: Annotated[str | None, typer.Option(help="MODEL fine-tunes this public one: hide what differs.")] = None,
    again: Annotated[
        Path | None,
        typer.Option(help="OLD/trusted, an earlier split of the same weights: use its camouflage again."),
    ] = None,
    plan: Annotated[
        str, typer.Option(help=f"Where blocks are computed: {KINDS}; or auto:9rt, auto:200ms, auto:5% for a budget.")
    ] = "all",
    rtt: Annotated[str, typer.Option(help="Round-trip time between the sides, for --plan auto:200ms.")] = "0ms",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter (PEFT's directory) to merge into MODEL.")] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; by default as its directory.")] = None,
    as_json: Json = False,
) -> None:
    """Split MODEL into OUTPUT/edge, which anyone may copy, and OUTPUT/trusted, which nobody else may see."""
    set_up_logging(False)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as an interrupt: half a bundle is removed
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    from sliplm.split.advice import weaknesses
    from sliplm.split.model import Options
    from sliplm.split.model import split_model as run

    quiet_transformers()
    options = Options(rank, planes, camouflage, blinding, base, again, plan)
    for sentence in weaknesses(options):
        err().print(f"slip: warning: {sentence}", style="yellow", markup=False)
    decide = places
    if plan.startswith("auto:"):
        if adapter is not None:
            raise SlipError("--plan auto measures MODEL as it is: merge the adapter first, or name a plan.")
        from sliplm.planner.budget import auto
        from sliplm.planner.costs import Network, Split

        with progress_bar("measuring what blocks are worth (blocks)") as progress:
            network = Network(units.duration(rtt))
            chosen = auto(model, plan, Split(rank, planes), network, progress=progress)
        decide = lambda *_: chosen  # noqa: E731
    with progress_bar("splitting (weights)") as progress:
        s = run(model, output, options, progress, adapter=adapter, name=name, decide=decide)
    emit(
        as_json,
        {"edge": str(output / "edge"), "trusted": str(output / "trusted"), **vars(s)},
        f"{output / 'edge'}     {s.edge_bytes / 1e6:,.0f} MB, for the machine you do not trust\n"
        f"{output / 'trusted'}  {s.trusted_bytes / 1e6:,.0f} MB, for yours: keep it secret\n"
        f"{s.layers} layers in {s.groups} groups protected, {s.protected_parameters / 1e6:,.0f} million weights; "
        f"split {s.digest[:16]}\n"
        + (f"{s.open}\n" if s.open else "")
        + (
            f"checked: {s.checked} differ from the original's by {s.error:.1e} of their spread"
            if s.checked
            else "not checked"
        ),
    )
