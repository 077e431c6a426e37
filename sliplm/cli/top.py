"""`slip top`: a live view of edges and trusted sides in the terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sliplm.cli.common import ApiKey, Json, read_api_key
from sliplm.errors import LinkError

HEADINGS = ("address", "side", "link", "requests", "running", "tokens/s", "exchanges/s", "an exchange", "pads",
             "failed checks")  # fmt: skip


def top(
    urls: Annotated[list[str], typer.Argument(help="HOST:PORT of an edge's API or of a trusted side's --metrics.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print, and end; fails if an address does.")] = False,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Watch edges and trusted sides: how fast they are, and what goes wrong. --json prints a line per look."""
    from sliplm import top as data

    key = read_api_key(api_key)
    addresses = [data.address(url) for url in urls]
    before: dict[str, data.Sample] = {}

    def look() -> list[dict[str, Any]]:
        rows = []
        for url in addresses:
            try:
                now = data.fetch(url, key)
                rows.append(data.row(url, now, before.get(url)))
                before[url] = now
            except LinkError as error:
                before.pop(url, None)
                rows.append({"url": url, "error": str(error)})
        return rows

    rows = look()
    if once:
        time.sleep(interval)
        rows = look()
        _print(rows, as_json)
        if any(row["error"] for row in rows):
            sys.exit(1)
        return
    try:
        if as_json or not sys.stdout.isatty():
            while True:
                time.sleep(interval)
                _print(look(), as_json)
        with Live(view(rows, 80), auto_refresh=False, screen=False) as live:
            while True:
                live.update(view(rows, live.console.width), refresh=True)  # its width may change
                time.sleep(interval)
                rows = look()
    except KeyboardInterrupt:
        return


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"endpoints": rows}), flush=True)
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(view(rows, console.width))


def view(rows: list[dict[str, Any]], width: int) -> Group:
    """The table, and below it what is wrong with those that it says nothing about."""
    errors = [Text(row["error"], style="red") for row in rows if row["error"]]
    return Group(_table(rows, width), *errors)


def _table(rows: list[dict[str, Any]], width: int) -> Table:
    """As many columns as `width` has room for: a number that is cut in two is worse than none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [_cells(row) for row in rows]
    used, shown = 0, 0
    for i, heading in enumerate(HEADINGS):
        used += max(len(Text.from_markup(line[i])) for line in [[*HEADINGS], *cells]) + 2
        if i >= 3 and used - 1 > width:
            break
        shown += 1
        table.add_column(heading, justify="left" if i < 3 else "right", no_wrap=i > 0, overflow="fold")
    for line in cells:
        table.add_row(*line[:shown])
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    where = row["url"].removeprefix("http://").removesuffix("/metrics").replace("[", "\\[")
    if row["error"]:
        return [where, "[red]away[/red]", *[""] * (len(HEADINGS) - 2)]
    edges = "1 edge" if row["connected"] == 1 else f"{row['connected']} edges"
    link = edges if row["side"] == "trusted" else "connected" if row["connected"] else "away"
    return [
        where,
        row["side"],
        link if row["connected"] else f"[red]{link}[/red]",
        _number(row["requests"]),
        _number(row["requests_in_progress"]),
        _number(row["tokens_per_second"], 1),
        _number(row["exchanges_per_second"], 1),
        "-" if row["exchange_seconds"] is None else f"{1e3 * row['exchange_seconds']:.2f} ms",
        _pads(row),
        f"[red]{row['verification_failures']:.0f}[/red]" if row["verification_failures"] else "0",
    ]


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _pads(row: dict[str, Any]) -> str:
    if row["pads_ready"] is None:
        return "-"
    return _number(row["pads_ready"]) + (f" of {row['pads_target']:.0f}" if row["pads_target"] else "")
