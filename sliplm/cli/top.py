"""`slip top`: a live view of edges and trusted sides in the terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from sliplm.cli.common import ApiKey, Json, read_api_key
from sliplm.errors import LinkError


def top(
    urls: Annotated[list[str], typer.Argument(help="HOST:PORT of an edge's API or of a trusted side's --metrics.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print, and end; fails if an address does.")] = False,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Watch edges and trusted sides: how fast they are, and what goes wrong. --json prints a line per look."""
    from rich.live import Live

    from sliplm import top as data
    from sliplm.cli.table import view

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
        from sliplm.cli.table import show

        show(rows)
