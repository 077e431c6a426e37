"""Who may hold which half of a secret: pads made by a party are never used with an edge of that party.

A helper knows the pads that it makes, an edge sees rows masked with them: one party with both would see the rows. This
is the only place that decides; what it cannot read as a party's name, it takes for everybody's.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
"""The form of a party's name, and of a device's, whose party has its name unless another is given. ASCII only, and
without spaces: no two names look alike because of the alphabet that they are from."""


def may_use(makers: frozenset[str], edge: str | None) -> bool:
    """Whether a pad that helpers of the parties `makers` have made may mask rows for an edge of the party `edge`.

    No makers: the trusted side made the pad itself. No edge: it is one inside the trusted process, and nobody else's.
    A pad of several makers needs all of them to be others than the edge, although one would do to keep it secret.
    """
    if edge is None:
        return all(NAME.match(maker) for maker in makers)
    return NAME.match(edge) is not None and all(may_pair(maker, edge) for maker in makers)


def may_pair(one: str, other: str) -> bool:
    """Whether these are two parties, so that two helpers of theirs may make one pad. Names that differ by case only are
    one party, written twice."""
    return bool(NAME.match(one) and NAME.match(other)) and one.lower() != other.lower()
