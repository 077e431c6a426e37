"""What one pass through a model costs under a plan: a sum over its blocks and groups.

Round trips and bytes follow from shapes alone, and are exact; seconds, from the speeds of machines and network, are a
model of `exchange.step`: encode, send, the network and the edge's product beside the trusted part, receive, decode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from sliplm.exchange.operator import BYTES, ROWS
from sliplm.exchange.step import PARTS
from sliplm.planner.shapes import Block, Group, Model
from sliplm.planner.speeds import Plain, Speeds
from sliplm.protocol.frames import HEADER
from sliplm.protocol.remote import AHEAD
from sliplm.split.camouflage import trusted_rank
from sliplm.split.places import Place

FLOAT = 4  # bytes of a field element, of a number in a hidden state or a cache, of a weight that is computed with whole


@dataclass(frozen=True)
class Network:
    """Between the sides: the round trip in seconds, and bytes a second each way."""

    round_trip: float = 0.0
    bandwidth: float = math.inf


@dataclass(frozen=True)
class Split:
    """How matrices are split, see `split.plan.Options`."""

    rank: int = 16
    planes: int = 2


@dataclass(frozen=True)
class Pass:
    """`rows` tokens of each of `streams` sequences, after `before` others."""

    rows: int = 1
    streams: int = 1
    before: int = 0


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds; those that either side computes; round trips; bytes to the edge and back, with headers."""

    seconds: float = 0.0
    trusted: float = 0.0
    edge: float = 0.0
    round_trips: float = 0.0
    sent: float = 0.0
    received: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * getattr(self, f.name) for f in fields(self)))


def outside(where: Sequence[Place]) -> Place:
    """Where what is in no block is computed, the head above all: masked if all blocks are, else on the trusted side."""
    return "masked" if all(place == "masked" for place in where) else "trusted"


def placed(model: Model, where: Sequence[Place]) -> Iterator[tuple[Group, Place]]:
    """Every group with its place."""
    for block, place in zip(model.blocks, where, strict=True):
        yield from ((group, place) for group in block.groups)
    yield from ((group, outside(where)) for group in model.around)


def factors(group: Group, rank: int) -> int:
    """Numbers in the low-rank parts of a group's matrices, which is also their multiply-adds a row."""
    return sum(trusted_rank(rank, rows, columns, True) * (rows + columns) for rows, columns in group.members)


def cost(model: Model, where: Sequence[Place], work: Pass, split: Split, speeds: Speeds, network: Network) -> Cost:
    """Of one pass: logits are those of each sequence's last token."""
    packed = all(place == "masked" for place in where)  # otherwise Transformers makes the pass (`trusted.together`)
    total = _on_trusted(speeds.trusted.step if packed else speeds.trusted.plain.step)
    before: Place = "trusted"
    for block, place in zip(model.blocks, where, strict=True):
        if place == "masked":
            rows = work.rows * work.streams
            for group in block.groups:
                total += masked(group, rows, split, speeds, network)
            total += _on_trusted(_attention(block, work, speeds.trusted.plain))
        elif place == "trusted":
            total += _on_trusted(_plain(block, work, speeds.trusted.plain))
        else:
            seconds = _plain(block, work, speeds.edge.plain)
            total += Cost(seconds=seconds, edge=seconds)
            if before != "open":
                total += Cost(seconds=speeds.edge.plain.step, edge=speeds.edge.plain.step)
                total += _hidden_states(model.hidden, work, speeds, network)
        before = place
    for group in model.around:
        if outside(where) == "masked":
            total += masked(group, work.streams, split, speeds, network)
        else:
            total += _on_trusted(_weights(group, work.streams, speeds.trusted.plain))
    return total


def masked(group: Group, rows: int, split: Split, speeds: Speeds, network: Network) -> Cost:
    """Of `rows` rows through a masked group; of a group that not all of them reach, what is to be expected."""
    hit = 1 - (1 - group.used) ** rows
    reached = rows * group.used / hit
    columns, height = group.size[1], split.planes * group.size[0]
    parts = math.ceil(reached / max(1, min(ROWS, BYTES // (FLOAT * max(height, columns)))))
    each = reached / parts
    sent, received = FLOAT * each * columns, FLOAT * each * height
    t, e = speeds.trusted, speeds.edge
    ahead = t.exchange + each * columns * t.encode + sent * t.tls
    after = received * t.tls + each * height * t.decode
    own = max(FLOAT / 2 * factors(group, split.rank) / t.read, each * factors(group, split.rank) / t.multiply_adds)
    product = max(height * columns / e.read, each * height * columns / e.multiply_adds) + (sent + received) * e.tls
    wire = (sent + received) / network.bandwidth
    trip = network.round_trip + wire + product
    alone = ahead + max(own, trip) + after
    # Of a long input several parts are under way, up to AHEAD of them, and the slowest of all who work on it sets the
    # pace; after so many PARTS the link is given to others.
    pace = max(ahead + own + after, product, wire, (ahead + trip + after) / AHEAD)
    runs = math.ceil(parts / PARTS)
    seconds = runs * alone + (parts - runs) * pace
    total = Cost(
        seconds, parts * (ahead + own + after), parts * product, parts, parts * (sent + HEADER.size),
        parts * (received + HEADER.size),
    )  # fmt: skip
    return total * hit


def _hidden_states(hidden: int, work: Pass, speeds: Speeds, network: Network) -> Cost:
    """There and back, through a run of open blocks."""
    size = FLOAT * work.rows * work.streams * hidden
    tls = 2 * size * speeds.trusted.tls + speeds.trusted.exchange
    there = 2 * size * speeds.edge.tls
    seconds = tls + there + network.round_trip + 2 * size / network.bandwidth
    return Cost(seconds, tls, there, 1, size + HEADER.size, size + HEADER.size)


def _on_trusted(seconds: float) -> Cost:
    return Cost(seconds=seconds, trusted=seconds)


def _plain(block: Block, work: Pass, machine: Plain) -> float:
    """Seconds of a block that one machine computes."""
    rows = work.rows * work.streams
    weights = sum(_weights(group, rows, machine) for group in block.groups)
    return (machine.many if rows > 1 else machine.block) + weights + _attention(block, work, machine)


def _weights(group: Group, rows: int, machine: Plain) -> float:
    """Seconds of `rows` rows, of which those that reach the group are multiplied with whole matrices."""
    reached = 1 - (1 - group.used) ** rows
    return max(
        FLOAT * group.weights * reached / machine.read, rows * group.used * group.weights / machine.multiply_adds
    )


def _attention(block: Block, work: Pass, machine: Plain) -> float:
    """Seconds in which all rows attend to what is before them: each sequence's cache is read, and multiplied."""
    seen = work.before + work.rows / 2
    cache = FLOAT * block.cache * (work.before + work.rows) * work.streams
    return max(cache / machine.read, 2 * block.scores * seen * work.rows * work.streams / machine.multiply_adds)
