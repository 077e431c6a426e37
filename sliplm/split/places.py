"""Where each decoder block of a model is computed (`slip split --plan`, `slip plan`): the words for it.

- all: every block masked: the protocol, and the theorem's case.
- first:N, last:N, blocks:0-3,28: those masked, the rest open.
- trusted:N: the first N whole on the trusted side, the rest open.
"""

from __future__ import annotations

import re
from typing import Literal

from sliplm.errors import SlipError

Place = Literal["masked", "trusted", "open"]
"""masked: by the protocol, on both sides. trusted: whole, on the trusted side. open: whole and plain, on the edge."""

KINDS = "all, first:N, last:N, blocks:0-3,28-31 or trusted:N"

_COUNTED = re.compile(r"(first|last|trusted):(\d{1,6})", re.ASCII)
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


def places(plan: str, blocks: int) -> list[Place]:
    """The place of every one of `blocks` decoder blocks, in order. Raises SlipError: no such plan, or it names blocks
    that are not there, or none."""
    if plan == "all":
        return ["masked"] * blocks
    if found := _COUNTED.fullmatch(plan):
        count = int(found[2])
        if not 0 < count <= blocks:
            raise SlipError(f"the plan {plan} names {count} blocks, and this model has {blocks}.")
        named: Place = "trusted" if found[1] == "trusted" else "masked"
        rest: list[Place] = ["open"] * (blocks - count)
        return [*rest, *[named] * count] if found[1] == "last" else [*[named] * count, *rest]
    if plan.startswith("blocks:"):
        masked = _spans(plan, blocks)
        return ["masked" if block in masked else "open" for block in range(blocks)]
    raise SlipError(f"{plan!a} is no plan: write {KINDS}.")


def _spans(plan: str, blocks: int) -> set[int]:
    named: set[int] = set()
    for text in plan.removeprefix("blocks:").split(","):
        found = _SPAN.fullmatch(text)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise SlipError(f"{text!a} in the plan is no range of blocks: write 3 or 0-3.")
        if last >= blocks:
            raise SlipError(f"the plan names block {last}, and this model's are 0 to {blocks - 1}.")
        named |= set(range(first, last + 1))
    return named
