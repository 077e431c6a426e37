"""Let a module be called by the name of the function it is about: `sliplm.split(...)`, `sliplm.protect(...)`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def callable_module(name: str, home: str, function: str) -> None:
    """Make calls of the module `name` calls of `function`, which the module `home` defines and is imported for."""

    class Callable(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), function)(*args, **kwargs)

    sys.modules[name].__class__ = Callable
