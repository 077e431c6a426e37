"""Grammars that would take for ever are tried where they do no harm."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_tokenizer

from sliplm.engine import trial
from sliplm.engine.constraint import TOO_COMPLEX, Constraint, Grammars
from sliplm.errors import BusyError, RequestError
from sliplm.protocol.messages import GenerateRequest

pytestmark = pytest.mark.slow  # schemas are tried in a process of their own


@pytest.fixture(scope="module")
def shared() -> Iterator[Grammars]:
    with contextlib.closing(Grammars(byte_tokenizer(), [256])) as grammars:
        yield grammars


@pytest.fixture
def grammars(shared: Grammars) -> Grammars:
    """Its process runs, and remembers nothing."""
    held(shared, {"const": 0})
    shared._trials._passed.clear()
    return shared


def held(grammars: Grammars, schema: dict[str, Any]) -> Constraint:
    return grammars.constraint(GenerateRequest(prompt="x", schema=schema), None, 0)


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def patterns(many: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(1, many)]


ENDLESS: list[dict[str, Any]] = [
    {"type": "integer", "multipleOf": 9999991},
    {"type": "array", "items": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]}},
    {"anyOf": [{"type": "integer", "multipleOf": 9999991 + 2 * i} for i in range(20)]},
    {"allOf": patterns(40)},
    {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)} | {"d1500": {}}, "$ref": "#/$defs/d0"},
]
"""In time and memory, and the last in stack."""


@pytest.mark.parametrize("schema", ENDLESS, ids=range(len(ENDLESS)))
def test_what_compiling_takes_is_bounded(grammars: Grammars, schema: dict[str, Any]) -> None:
    before = memory()
    with pytest.raises(RequestError) as caught:
        held(grammars, schema)
    assert str(caught.value) == TOO_COMPLEX and memory() - before < 50 << 20
    assert held(grammars, {"const": 1})._matcher.validate_tokens(byte_tokenizer().encode("1")) == 1


def test_several_at_once_are_tried_one_after_the_other(grammars: Grammars) -> None:
    def fault(i: int) -> str | None:
        try:
            held(grammars, {"const": i} if i % 2 else {"type": f"type{i}"})
        except RequestError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fault, range(8)))
    assert found[1::2] == [None] * 4
    assert all(f"Invalid type: type{i}" in (found[i] or "") for i in range(0, 8, 2))


def test_nobody_waits_for_ever_and_who_passed_before_not_at_all(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(trial, "REMEMBERED", 2)
    for known in (1, 2, 3):
        held(grammars, {"const": known})
    with grammars._trials._lock:
        held(grammars, {"const": 3})
        for forgotten_or_new in (1, 4):
            with pytest.raises(BusyError, match="busy with other schemas"):
                held(grammars, {"const": forgotten_or_new})
    held(grammars, {"const": 4})


def test_a_process_that_does_not_answer_is_ended(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    child = grammars._trials._child
    assert child is not None
    monkeypatch.setattr(trial, "TRY_SECONDS", 0.2)
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(RequestError, match="too complex"):
        held(grammars, {"const": 1})
    assert child.poll() == -signal.SIGKILL
    monkeypatch.undo()
    held(grammars, {"const": 1})


def test_the_process_knows_what_it_has_to_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "xanadu")
    grammars = Grammars(byte_tokenizer(), [256])
    held(grammars, {"const": "kubla"})
    child = grammars._trials._child
    assert child is not None and child.stdin is not None
    proc = Path(f"/proc/{child.pid}")
    seen = proc.joinpath("environ").read_bytes() + proc.joinpath("cmdline").read_bytes()
    assert b"sliplm.engine.grammar" in seen and not any(word in seen for word in (b"xanadu", b"kubla", b"<end>"))
    assert "torch" not in proc.joinpath("maps").read_text()
    assert "Max core file size        0" in proc.joinpath("limits").read_text()
    child.stdin.close()  # as when the trusted side is killed
    assert child.wait(10) == 0
    held(grammars, {"const": "khan"})
    assert grammars._trials._child is not child
    grammars.close()
    assert grammars._trials._child.poll() == -signal.SIGKILL
