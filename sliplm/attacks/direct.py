"""Use the edge part as it is.

Threat model: the thief builds the architecture around the stolen integers and runs it. Source: SLIP, arXiv
2407.10886, section 6. Oracles: any; without scales, every row gets the size of a fresh one.
"""

from __future__ import annotations

from typing import Any

from sliplm.attacks.training import Data, perplexity


def attack(model: Any, data: Data) -> dict[str, Any]:
    """A line (see `lines.line`) of one point."""
    found = perplexity(model, data.held)
    valid = perplexity(model, data.valid)
    return {"rate": 0.0, "valid": valid, "tokens": [0], "ppl": [found], "reached": found, "low": found, "high": found}
