"""What all commands share: the two consoles, progress, logging, and options that several of them take."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sliplm.logs import JsonFormatter

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
Model = Annotated[str, typer.Argument(help="A directory of safetensors, a .gguf file, or a hub id.")]
Reference = Annotated[str, typer.Option(help="The original model: a directory, a .gguf file, or a hub id.")]
Rank = Annotated[int, typer.Option(help="Singular components per matrix kept on the trusted side.")]
Planes = Annotated[int, typer.Option(help="int8 matrices per weight on the edge: 2 is exact, 1 is fast.")]
RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry", envvar="SLIP_REGISTRY", help="URL of the device registry; a file in the bundle if absent."
    ),
]
Api = Annotated[str, typer.Option(help="Where an edge serves its API.")]
ApiKey = Annotated[Path | None, typer.Option("--api-key", help="A file with the API's key, if it has one.")]


class Format(str, Enum):
    TEXT = "text"
    JSON = "json"


LogFormat = Annotated[Format, typer.Option("--log-format", help="Log lines for people, or one JSON object each.")]


# Rich is imported when there is something to say: an edge starts without it.


@cache
def out() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


@cache
def err() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class _ForPeople(logging.Handler):
    """Log lines as Rich sets them."""

    @cached_property
    def _rich(self) -> logging.Handler:
        from rich.logging import RichHandler

        handler = RichHandler(console=err(), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        self._rich.emit(record)


def fail(sentence: str) -> NoReturn:
    err().print(f"slip: {sentence}", style="red", markup=False)
    sys.exit(1)


def set_up_logging(verbose: bool, log_format: Format = Format.TEXT) -> None:
    handler: logging.Handler = _ForPeople()
    if log_format == Format.JSON:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
    # Other packages' reports (migrations, requests, loading) tell nothing that the reader has to know.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("sliplm").setLevel(logging.INFO if verbose else logging.WARNING)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def emit(as_json: bool, value: dict[str, Any], text: str) -> None:
    if as_json:
        print(json.dumps(value), flush=True)
    else:
        out().print(text, markup=False)
        sys.stdout.flush()


def read_api_key(path: Path | None) -> str | None:
    from sliplm.edge.options import read_key

    return read_key(path) if path else None


def printable(text: str, terminal: bool) -> str:
    """Without control characters, if it goes to a terminal: the model must not steer it."""
    return plain(text, keep="\n\t") if terminal else text


def plain(text: str, keep: str = "") -> str:
    """`text` without control characters but those in `keep`."""
    return "".join(c for c in text if c in keep or (c >= " " and not "\x7f" <= c <= "\x9f"))
