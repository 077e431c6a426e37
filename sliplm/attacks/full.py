"""Fine-tune everything.

Threat model: the thief trains all weights, starting from the stolen ones, on text of its own. Source: SLIP, arXiv
2407.10886; TEESlice, arXiv 2310.07152, for the yardstick, the same training without a bundle.
Oracles: any.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sliplm.attacks.stolen import Oracles, Stolen

RATES = (1e-3, 2e-3)
RATES_IF_KNOWN = (3e-4, 1e-3)  # true scales make for large gradients


def prepare(model: Any, stolen: Stolen, oracles: Oracles) -> list[nn.Parameter]:
    """What is trained: every parameter."""
    return list(model.parameters())
