"""The rooms of the house: what may import what, read from the code. A line knows which side may hold it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import sliplm
from sliplm.extras import EXTRAS

ROOT = Path(sliplm.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}
MEASURING = ("attacks", "evaluate", "planner", "speed")
TRUSTED_ONLY = ("trusted", "exchange", "split", "registry", "engine", "serve", "pads", *MEASURING)
EXTRA = {module for _, modules in EXTRAS.values() for module in modules}


def imports(module: str) -> set[str]:
    """What `module` imports, however late: our own modules by their names below `sliplm`, others by their first name.
    What only type checkers read does not count."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    own = {name.removeprefix("sliplm.") for name in found if name.startswith("sliplm.")}
    return (own & MODULES.keys()) | {name.partition(".")[0] for name in found if name.partition(".")[0] != "sliplm"}


@cache
def reaches(module: str) -> frozenset[str]:
    """All that is imported because `module` is."""
    seen, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()) - seen:
            seen.add(name)
            if name in MODULES:
                todo.append(name)
    return frozenset(seen)


def room(module: str) -> str:
    return module.partition(".")[0]


def inside(*rooms: str) -> list[str]:
    return sorted(name for name in MODULES if room(name) in rooms and "migrations" not in name)


def test_the_reader_of_imports_reads_them() -> None:
    assert {"errors", "bundle", "kernels"} <= imports("edge.multiplier") | reaches("edge.side")
    assert "torch" in imports("trusted.linear") and "socket" in imports("protocol.channel")


@pytest.mark.parametrize("module", inside("edge"))
def test_the_edge_never_reaches_what_only_the_trusted_side_may_hold(module: str) -> None:
    assert not [name for name in reaches(module) if name in MODULES and room(name) in TRUSTED_ONLY]


@pytest.mark.parametrize("module", inside("open"))
def test_open_blocks_are_either_side_s(module: str) -> None:
    assert not [name for name in reaches(module) if name in MODULES and room(name) in TRUSTED_ONLY]


@pytest.mark.parametrize("module", inside("protocol"))
def test_the_protocol_knows_numbers_and_errors_only(module: str) -> None:
    own = {name for name in imports(module) if name in MODULES}
    assert not {name for name in own if room(name) not in ("protocol", "field", "errors", "_core")} - {"exchange.link"}


@pytest.mark.parametrize("module", inside("exchange"))
def test_the_exchange_has_no_sockets(module: str) -> None:
    assert not reaches(module) & {"socket", "ssl", "asyncio", "httpx"}
    assert not [name for name in reaches(module) if room(name) in ("protocol", "edge", "serve", "trusted")]


@pytest.mark.parametrize("module", inside("serve"))
def test_the_server_needs_no_torch(module: str) -> None:
    assert not reaches(module) & {"torch", "transformers"}


@pytest.mark.parametrize("module", [*inside("edge"), "cli.edge", "cli.ask", "cli.chat", "cli.top", "cli.inspect"])
def test_an_edge_and_its_clients_need_no_extra(module: str) -> None:
    assert not reaches(module) & EXTRA


def test_of_the_kernels_those_for_cuda_alone_need_torch_and_nothing_imports_them_unasked() -> None:
    for_cuda = {"kernels.cuda", "kernels.triton_kernel"}
    assert {module for module in inside("kernels") if imports(module) & EXTRA} == for_cuda
    assert not [module for module in MODULES if imports(module) & for_cuda and module not in for_cuda]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_the_commands(module: str) -> None:
    assert room(module) in ("cli",) or not [name for name in imports(module) if room(name) == "cli"]
