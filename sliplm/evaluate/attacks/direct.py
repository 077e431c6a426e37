"""Use the edge part as it is.

Threat model: the thief builds the architecture around the stolen integers and runs it. Source: SLIP, arXiv
2407.10886, section 6. Oracles: any; without scales, every row gets the size of a fresh one.
"""

from __future__ import annotations

from sliplm.evaluate.attacks.stolen import Oracles, Stolen
from sliplm.evaluate.attacks.training import Curve, Data, perplexity


def attack(stolen: Stolen, oracles: Oracles, data: Data) -> Curve:
    return Curve([0], [perplexity(stolen.model(oracles), data.held)])
