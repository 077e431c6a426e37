"""What an owner asks of a split, and what it then decides for every group of matrices; the plan is stored in the
trusted bundle's config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from sliplm.errors import BundleError, SlipError
from sliplm.split.places import Place


@dataclass(frozen=True)
class Options:
    """How to split.

    Attributes:
        rank: singular components per matrix that the trusted side keeps.
        planes: int8 matrices per weight on the edge: 2 is exact for all purposes, 1 is fast.
        camouflage, blinding: as in docs/security.md, "What the edge bundle reveals"; off only to measure what they do.
        base: the public model that this one is a fine-tune of; then only the difference is protected (`split.base`).
        again: DIR/trusted of an earlier split of the same weights, to use its camouflage again (`split.again`).
        plan: where each decoder block is computed, see `split.places`.
        leading: off, random directions are protected in place of the most sensitive ones. This saves most of the time,
            protects nothing, and is for benchmarks on models whose weights are random anyway.
    """

    rank: int = 16
    planes: int = 2
    camouflage: bool = True
    blinding: bool = True
    base: str | None = None
    again: Path | None = None
    plan: str = "all"
    leading: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SlipError("the rank must be at least 1.")
        if self.planes not in (1, 2):
            raise SlipError("planes must be 1 or 2.")
        if self.plan != "all" and self.base is not None:
            raise SlipError(
                "with --base all blocks are masked: open ones would give away their difference from the public model, "
                "which is all that there is to protect."
            )


class GroupPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one group is protected.

    Attributes:
        members: its matrices, by the names of the modules that stand for them in the protected model.
        kind: "stack", matrices that read the same input, one above the other; "sum", matrices whose outputs are only
            ever added up, side by side.
        rank: singular components of every matrix that the trusted side keeps; of masked groups.
        planes: int8 matrices on the edge, 1 or 2; of masked groups.
        place: "masked", the protocol: the rest of the matrix is on the edge, and all that it sees is masked. "trusted",
            whole on the trusted side; "open", whole on the edge, in plain. Only masked groups have a number there.
    """

    members: tuple[str, ...]
    kind: Literal["stack", "sum"]
    rank: int
    planes: int
    place: Place = "masked"


class OpenPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The open blocks of a model: the `path` of its list of blocks, and the first and the last one of every run."""

    path: str
    runs: tuple[tuple[int, int], ...]


def masked(plan: Sequence[GroupPlan]) -> list[GroupPlan]:
    """Those of the masked groups: the one at index g is that of the edge's group number g."""
    return [group for group in plan if group.place == "masked"]


def gives_away(runs: Sequence[tuple[int, int]]) -> str:
    """What everybody is told of a split with open `runs` of blocks."""
    named = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
    many = len(runs) > 1 or runs[0][0] < runs[0][1]
    return (
        f"{'blocks' if many else 'block'} {named} {'are' if many else 'is'} open: the edge has these weights in plain, "
        "sees the hidden states that enter and leave them, and can answer wrongly unnoticed"
    )


def read_open(settings: Any) -> OpenPlan | None:
    """What the `quantization_config` of a trusted bundle says of open blocks; None if there are none. Raises
    BundleError."""
    try:
        found = msgspec.convert(settings.get("open"), OpenPlan | None)
    except msgspec.ValidationError:
        raise BundleError("the bundle's configuration says nothing sensible of open blocks.") from None
    if found is not None and (not found.runs or any(not 0 <= first <= last for first, last in found.runs)):
        raise BundleError("the bundle's configuration names open blocks that cannot be.")
    return found


def read_plan(settings: Any) -> list[GroupPlan]:
    """The plan in `settings`, the `quantization_config` of a trusted bundle of this format or of an earlier one.

    Raises BundleError: it has none, or a wrong one.
    """
    try:
        if "plan" not in settings:  # before format 4: one rank and number of planes for all
            settings = {
                "plan": [
                    {
                        "members": members,
                        "kind": "sum" if number in settings.get("sums", ()) else "stack",
                        "rank": settings["rank"],
                        "planes": settings["planes"],
                    }
                    for number, members in enumerate(settings["groups"])
                ]
            }
        plan = msgspec.convert(settings["plan"], list[GroupPlan])
    except (KeyError, TypeError, msgspec.ValidationError):
        raise BundleError("the bundle's configuration has no plan of the split, or a damaged one.") from None
    check_plan(plan)
    return plan


def check_plan(plan: Sequence[GroupPlan]) -> None:
    """Raises BundleError if a rank or a number of planes cannot be, or a matrix is in two groups."""
    if not plan:
        raise BundleError("the plan has no groups: nothing would be protected.")
    names = [name for group in plan for name in group.members]
    if len(set(names)) < len(names) or not all(group.members for group in plan):
        raise BundleError("the plan names a matrix twice, or a group without any.")
    for group in plan:
        if group.rank < 1 or group.planes not in (1, 2):
            raise BundleError(f"the plan of {group.members[0]} has rank {group.rank} and {group.planes} planes.")


def to_settings(plan: Sequence[GroupPlan]) -> list[dict[str, Any]]:
    """What `read_plan` reads: built-in types, for config.json."""
    return [msgspec.to_builtins(group) for group in plan]
