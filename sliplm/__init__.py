"""Run a model on hardware you do not trust, without giving its weights away (SLIP, arXiv 2407.10886).

    sliplm.protect(module, inputs)      any torch module, protected in this process: notebooks, tests
    sliplm.split_model(model, out)      a checkpoint into out/edge and out/trusted
    sliplm.Trusted(bundle)              the trusted side: loads out/trusted, serves edges
    sliplm.Edge(bundle, trusted, id)    the edge: loads out/edge, multiplies for the trusted side

Each is imported when it is first used, so that an edge never loads what only the trusted side needs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Edge", "Trusted", "protect", "split_model"]

_HOMES = {
    "Edge": "sliplm.edge.side",
    "Trusted": "sliplm.trusted.side",
    "protect": "sliplm.trusted.protect",
    "split_model": "sliplm.split.model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sliplm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
