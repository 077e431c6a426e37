"""What to tell an owner whose choices make the edge bundle worth more than it has to be."""

from __future__ import annotations

from sliplm.split.model import Options

RANK_FLOOR = 8  # below it, a thief with every oracle has less to learn than we have measured (docs/security.md)


def weaknesses(options: Options) -> list[str]:
    """One sentence for each weak choice."""
    found = []
    if options.rank < RANK_FLOOR:
        found.append(f"rank {options.rank} is below {RANK_FLOOR}: little is missing from the edge bundle.")
    if not options.camouflage:
        found.append("without camouflage the edge bundle shows where the protected subspaces are.")
    if not options.blinding:
        found.append(
            "without blinding the edge bundle is in the model's own basis, and a thief can compose its layers."
        )
    return found
