"""Fine-tune everything.

Threat model: the thief trains all weights, starting from the stolen ones, on text of its own. Source: SLIP, arXiv
2407.10886; TEESlice, arXiv 2310.07152, for the yardstick, the same training without a bundle.
Oracles: any.
"""

from __future__ import annotations

from typing import Any

from sliplm.evaluate.attacks.stolen import Oracles, Stolen
from sliplm.evaluate.attacks.training import Curve, Data, learn


def attack(stolen: Stolen, oracles: Oracles, data: Data) -> Curve:
    return learn(stolen.model(oracles), lambda model: list(model.parameters()), data)


def without(start: Any, data: Data) -> Curve:
    """A thief without any bundle, from `Stolen.scratch()` or `Stolen.placebo()`."""
    return learn(start, lambda model: list(model.parameters()), data)
