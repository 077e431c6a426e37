"""The table of `slip top`."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

HEADINGS = ("address", "side", "link", "requests", "running", "tokens/s", "exchanges/s", "an exchange", "pads",
             "failed checks")  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(view(rows, console.width))


def view(rows: list[dict[str, Any]], width: int) -> Group:
    """The table, and below it who computes rows and makes pads, and what is wrong with those without numbers."""
    errors = [Text(row["error"], style="red") for row in rows if row["error"]]
    more = [
        Text(line) for row in rows if not row["error"] for line in (_edges(row), _makers(row), _drafts(row)) if line
    ]
    return Group(_table(rows, width), *more, *errors)


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
    where = _where(row).replace("[", "\\[")
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


def _where(row: dict[str, Any]) -> str:
    where: str = row["url"].removeprefix("http://").removesuffix("/metrics")
    return where


def _edges(row: dict[str, Any]) -> str:
    """How much each edge computes, if there are several, and how often one had to be replaced."""
    rates: dict[str, float] = row["edge_rows_per_second"]
    total = sum(rates.values())
    said = [f"{name} {rate:,.0f} rows/s ({rate / total:.0%})" for name, rate in rates.items()] if len(rates) > 1 else []
    if row["exchanges_replaced"]:
        said += [f"{_number(row['exchanges_replaced'])} times another edge was asked"]
    return f"{_where(row)}: {', '.join(said)}" if said else ""


def _drafts(row: dict[str, Any]) -> str:
    """What guessing tokens has saved lately."""
    each = row["tokens_per_pass"]
    return f"{_where(row)}: {each:.2f} tokens a pass" if each is not None and each > 1 else ""


def _makers(row: dict[str, Any]) -> str:
    """Who makes pads, if helpers do, and how many are on disk, if any are."""
    said = []
    if row["helpers_connected"] is not None:
        said += [
            "1 helper" if row["helpers_connected"] == 1 else f"{_number(row['helpers_connected'])} helpers",
            f"{_number(row['helper_pads_per_second'])} pads/s",
            f"{_number(row['helper_lies'])} wrong",
            f"{_number(row['pads_refused'])} times only pads of an edge's own party",
        ]
    if row["pads_stored"]:
        said += [f"on disk those of {_number(row['pads_stored'])} tokens, {row['pads_stored_bytes'] / 1e6:,.0f} MB"]
    return f"{_where(row)}: {', '.join(said)}" if said else ""


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _pads(row: dict[str, Any]) -> str:
    if row["pads_ready"] is None:
        return "-"
    return _number(row["pads_ready"]) + (f" of {row['pads_target']:.0f}" if row["pads_target"] else "")
