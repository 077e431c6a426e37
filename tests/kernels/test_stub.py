"""What type checkers are told about the native core, `_native.pyi`, is what was built: names, parameters, types."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sliplm import _core

ROOM = Path(_core.__file__).parent
KINDS = ("Vector", "Matrix", "Cube", "Four", "Five")  # arrays of one to five dimensions
NAMES = {"bool": "bool_"}  # numpy's, where they are others
ARRAY = re.compile(r"ndarray\[dtype=(\w+), shape=\(([*, ]+)\)(, order='C')?, device='cpu'(?:, writable=False)?\]")


def declared(stub: str) -> dict[str, str]:
    """The signatures in a stub, by name: "encode", "PackedMatrix.product"."""
    tree = ast.parse(stub)
    alias = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "Blinding")
    found = {}
    for node in tree.body:
        prefix, body = (f"{node.name}.", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
        for function in body:
            if isinstance(function, ast.FunctionDef):
                signature = f"({ast.unparse(function.args)}) -> {ast.unparse(function.returns or ast.Constant(None))}"
                found[prefix + function.name] = re.sub(r"\bBlinding\b", ast.unparse(alias), signature)
    return found


def built(module: ModuleType) -> dict[str, str]:
    """The signatures of an extension, as nanobind writes them down."""
    members: dict[str, Any] = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    for name, value in list(members.items()):
        if isinstance(value, type):
            del members[name]
            own = {k: v for k, v in vars(value).items() if k == "__init__" or not k.startswith("_")}
            members |= {f"{name}.{k}": v.fget if isinstance(v, property) else v for k, v in own.items()}
    return {name: normal(value.__doc__) for name, value in members.items()}


def normal(doc: str) -> str:
    """One of nanobind's signatures, in the stub's words."""
    # Which arrays have to be contiguous, the stub says in words.
    text = ARRAY.sub(lambda m: f"{KINDS[m[2].count('*') - 1]}[np.{NAMES.get(m[1], m[1])}]", doc.splitlines()[0])
    text = "def f" + text[text.index("(") :].replace("collections.abc.", "") + ": ..."
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef) and function.returns is not None
    return f"({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
def test_the_stub_declares_the_extension_that_was_built() -> None:
    from sliplm._core import _native

    assert declared((ROOM / "_native.pyi").read_text()) == built(_native)


def test_what_users_import_has_everything_in_the_stub() -> None:
    """`native` is typed by a class that takes its members from the stub, one by one."""
    tree = ast.parse((ROOM / "__init__.py").read_text())
    typed = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Native")
    members = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in typed.body if isinstance(n, ast.Assign)}
    stub = ast.parse((ROOM / "_native.pyi").read_text()).body
    assert members == {n.name: f"_native.{n.name}" for n in stub if isinstance(n, ast.ClassDef)} | {
        n.name: f"staticmethod(_native.{n.name})" for n in stub if isinstance(n, ast.FunctionDef)
    }


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("    image: Matrix[np.uint32],\n", ""),
        ("length: float", "size: float"),
        ("uq: Matrix[np.uint32]", "uq: Matrix[np.int32]"),
        ("keys: Four", "keys: Cube"),
        ("threads: int = 0", "threads: int = 1"),
        ("def isas()", "def sets()"),
        ("    @property\n    def nbytes(self) -> int: ...\n", ""),
        ("Blinding: TypeAlias = tuple[Matrix[np.int32]", "Blinding: TypeAlias = tuple[Matrix[np.int64]"),
    ],
)
def test_the_comparison_sees_a_difference(was: str, becomes: str) -> None:
    from sliplm._core import _native

    stub = (ROOM / "_native.pyi").read_text()
    assert was in stub
    assert declared(stub.replace(was, becomes)) != built(_native)
