"""`slip inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sliplm.cli.common import Json, emit, out


def inspect(
    directory: Annotated[Path, typer.Argument(help="DIR of `slip split`, or one half of it: DIR/edge, DIR/trusted.")],
    as_json: Json = False,
) -> None:
    """Show what is protected and how, what stays where, and how large either side is."""
    from sliplm.split.inspect import inspect as run

    found = run(directory)
    if as_json:
        emit(True, found, "")
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from sliplm.split.inspect import summarise, summarise_kept

    head = f"split {found['split'][:16]}"
    if "model" in found:
        hidden = [name for name in ("blinding", "camouflage") if found[name]] or ["no hardening"]
        base = "; of a fine-tune, split with its public base" if found["based"] else ""
        head += f": {found['model']} ({found['architecture']}), {' and '.join(hidden)}{base}"
    out().print(head, markup=False)
    if "open" in found:
        out().print(found["open"]["note"], markup=False, style="yellow")
    table = Table(box=None, pad_edge=False)
    table.add_column("groups", justify="right")
    table.add_column("matrices", overflow="fold")
    for name in ("kind", "rank", "planes", "place", "Q", "edge MB", "trusted MB"):
        table.add_column(name, justify="right")
    for row in summarise(found["groups"]):
        shape = " x ".join(map(str, row["shape"])) if row["shape"] else "?"
        unknown = "?" if row["place"] in (None, "masked") else "-"
        shape = shape if row["shape"] else unknown
        plan = [str(row[key] or unknown) for key in ("kind", "rank", "planes", "place")]
        sizes = [f"{row[side] / 1e6:.1f}" if row[side] else unknown for side in ("edge", "trusted")]
        table.add_row(str(row["count"]), escape(row["members"]), *plan, shape, *sizes)
    out().print(table)
    for name, count, size in summarise_kept(found.get("kept", {})):
        out().print(f"on the trusted side, whole: {name} ({count}), {size / 1e6:.1f} MB", markup=False)
    for side in ("edge", "trusted"):
        if f"{side}_bytes" in found:
            out().print(f"{side} bundle on disk: {found[f'{side}_bytes'] / 1e6:.1f} MB", markup=False)
