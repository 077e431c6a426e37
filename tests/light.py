"""Python as an edge has it: without what the extras of the package bring."""

from __future__ import annotations

import sys

from sliplm.extras import EXTRAS

_HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {absent!r} else find(name, *rest)
"""
SLIP = "from sliplm.cli import main; main()"
"""The code of the command."""


def light(code: str) -> list[str]:
    """The line that runs `code` where nothing is installed that an extra brings."""
    hidden = tuple(module for _, modules in EXTRAS.values() for module in modules)
    return [sys.executable, "-c", _HIDE.format(absent=hidden) + code]
