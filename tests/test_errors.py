"""One hierarchy: what every error is on the wire, in the edge's API and in the usage records."""

from __future__ import annotations

import ast
import contextlib
import re
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from bench.soak import plain
from sliplm.edge.api.errors import translate
from sliplm.errors import (
    RECEIVED,
    BundleError,
    Code,
    InternalError,
    LinkError,
    NumericsError,
    RegistryError,
    RulesError,
    SlipError,
    UnsupportedModelError,
)
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Kind
from sliplm.protocol.session import Session
from sliplm.serve.metrics import OUTCOMES

DOCS = Path(__file__).parents[1] / "docs"

ARRIVES: dict[type[SlipError], type[SlipError]] = {
    SlipError: InternalError,
    UnsupportedModelError: InternalError,
    NumericsError: InternalError,
    RulesError: InternalError,
    BundleError: InternalError,
    RegistryError: LinkError,  # it says nothing about the device
}
"""Errors that are none of the other side's business."""


def all_errors(kind: type[SlipError] = SlipError) -> list[type[SlipError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in all_errors(below))]


EACH = pytest.mark.parametrize("kind", all_errors())


def raised(kind: type[SlipError]) -> SlipError:
    try:
        raise kind("the text")
    except SlipError as error:
        return error


def over_the_wire(error: Exception) -> SlipError:
    here, there = (Session(end, plain.Context()) for end in socket.socketpair())
    with contextlib.closing(here.socket), contextlib.closing(there.socket):
        Channel(cast(Any, here), "the edge", 5.0).tell(error)
        receiver = Channel(cast(Any, there), "the trusted side", 5.0)
        header = receiver.receive()
        assert header.kind == Kind.ERROR
        return receiver.read_error(header)


def test_no_error_is_kept_elsewhere() -> None:
    names = {kind.__name__ for kind in all_errors()}
    for path in (Path(__file__).parents[1] / "sliplm").rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
        bases = {getattr(base, "id", getattr(base, "attr", "")) for each in classes for base in each.bases}
        assert path.name == "errors.py" or not names & bases, path


@EACH
def test_everyone_can_be_sent_answered_and_counted(kind: type[SlipError]) -> None:
    assert isinstance(kind.code, Code) and kind.status in (400, 403, 429, 500, 502, 503) and kind.reason
    assert kind.outcome in OUTCOMES


def test_every_code_has_one_class() -> None:
    assert list(sorted(RECEIVED)) == list(Code)
    assert all(kind.code == code for code, kind in RECEIVED.items())


@EACH
def test_over_the_wire_and_back(kind: type[SlipError]) -> None:
    parents = [each for each in kind.__mro__ if each in RECEIVED.values()]
    received = over_the_wire(raised(kind))
    assert type(received) is ARRIVES.get(kind, parents[0] if parents else None)
    assert (str(received) == "the text") == (not kind.told)


def test_a_time_to_wait_crosses_the_wire() -> None:
    error = RECEIVED[Code.BUSY]("the text")
    assert over_the_wire(error).retry_after is None
    error.retry_after = 7
    assert over_the_wire(error).retry_after == 7


def test_the_text_of_an_unexpected_exception_never_crosses_it() -> None:
    assert "the text" not in str(over_the_wire(RuntimeError("the text")))


def rows(page: str, columns: str) -> list[list[str]]:
    """The table of a page of `docs` under the line that begins with `columns`."""
    table = (DOCS / page).read_text("utf-8").partition(columns)[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_codes_are_those_of_the_specification() -> None:
    again = {}
    for number, name, _, what in rows("protocol.md", "| code | name |"):
        assert Code[name] == int(number)
        again[Code[name]] = what in ("yes", "once it has")
    assert again == {code: kind.retry for code, kind in RECEIVED.items()}


@EACH
def test_the_answer_is_the_documented_one(kind: type[SlipError]) -> None:
    shown = translate(raised(kind))
    documented = {
        (status, code)
        for statuses, codes, _ in rows("operations.md", "| status | `code` |")
        for status in statuses.split(", ")
        for code in re.findall("`([a-z_]+)`", codes)
    }
    assert (str(shown.status), shown.code) in documented
    assert (shown.status, shown.code) == (kind.status, kind.reason)
    assert ("the text" in shown.message) == kind.public
    assert (shown.status in (429, 503)) == kind.retry
    assert shown.headers == (
        {"retry-after": "2"}
        if shown.status == 429
        else {"x-should-retry": "false"}
        if shown.status in (403, 500, 502)
        else {}
    )


@EACH
def test_the_outcome_is_a_documented_one(kind: type[SlipError]) -> None:
    (line,) = [what for name, what in rows("operations.md", "| column |") if name == "`outcome`"]
    assert f"`{kind.outcome}`" in line
