"""Plans side by side: what each would cost, before anything is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sliplm.exchange.check import CHECKS
from sliplm.exchange.operator import Operator
from sliplm.planner.costs import FLOAT, Network, Pass, Split, cost, factors, placed
from sliplm.planner.shapes import Group, Model
from sliplm.planner.speeds import Speeds
from sliplm.prg import KEY_BYTES
from sliplm.split.places import Place, places


@dataclass(frozen=True)
class Work:
    """What is asked of the model: `streams` sequences at once, after a prompt of `prompt` tokens each."""

    streams: int = 1
    prompt: int = 512


@dataclass(frozen=True)
class Prediction:
    """A plan's cost.

    Attributes:
        masked, trusted, open: how many blocks are where.
        round_trips, sent, received: of one decoded token of one sequence; bytes, with headers.
        decode: tokens a second, of all sequences together. seconds: from one token of a sequence to its next.
        prefill: tokens a second of a prompt. first: seconds that it takes.
        trusted_multiply_adds: of one token, attention and check apart; trusted_share: of the whole model's.
        checks: the check's, in integers.
        trusted_bytes: factors, secrets, whole weights and the embedding, and the caches of all sequences; what a
            process holds besides, torch above all, is some 460 MB.
        edge_bytes: Q, and open blocks with their caches.
        pad_bytes: of one token's pads. stock_bytes: of those of all prompts.
        helpers: how many machines as fast as the edge make pads as fast as decoding uses them up.
    """

    plan: str
    masked: int
    trusted: int
    open: int
    round_trips: float
    sent: float
    received: float
    decode: float
    seconds: float
    prefill: float
    first: float
    trusted_multiply_adds: float
    trusted_share: float
    checks: float
    trusted_bytes: float
    edge_bytes: float
    pad_bytes: float
    stock_bytes: float
    helpers: int


def predict(
    model: Model, plans: Sequence[str], work: Work, split: Split, speeds: Speeds, network: Network
) -> list[Prediction]:
    """What each of `plans` costs. Raises SlipError: a plan that the model cannot have."""
    return [of(model, plan, places(plan, len(model.blocks)), work, split, speeds, network) for plan in plans]


def of(
    model: Model, plan: str, where: Sequence[Place], work: Work, split: Split, speeds: Speeds, network: Network
) -> Prediction:
    """What it costs to have every block where `where` says; `plan` is what that is called."""
    seen = work.prompt
    one = cost(model, where, Pass(before=seen), split, speeds, network)
    if "open" in where:  # sequences are decoded side by side, each for itself
        seconds = max(one.seconds, work.streams * max(one.trusted, one.edge))
    else:
        seconds = cost(model, where, Pass(streams=work.streams, before=seen), split, speeds, network).seconds
    first = cost(model, where, Pass(rows=work.prompt), split, speeds, network).seconds
    masked = [group for group, place in placed(model, where) if place == "masked"]
    whole = [group for group, place in placed(model, where) if place == "trusted"]
    arithmetic = sum(g.used * factors(g, split.rank) for g in masked) + sum(g.used * g.weights for g in whole)
    pads = sum(g.used * (FLOAT * split.planes * g.size[0]) for g in masked)
    making = sum(g.used * split.planes * g.weights for g in masked) / speeds.edge.multiply_adds
    held = FLOAT * (work.prompt + 1) * work.streams
    caches = {kind: sum(b.cache for b, p in zip(model.blocks, where, strict=True) if (p == "open") is kind) * held
              for kind in (False, True)}  # fmt: skip
    decode = work.streams / seconds
    return Prediction(
        plan=plan,
        masked=list(where).count("masked"),
        trusted=list(where).count("trusted"),
        open=list(where).count("open"),
        round_trips=one.round_trips,
        sent=one.sent,
        received=one.received,
        decode=decode,
        seconds=seconds,
        prefill=work.prompt / first,
        first=first,
        trusted_multiply_adds=arithmetic,
        trusted_share=arithmetic / model.multiply_adds,
        checks=sum(g.used * CHECKS * (split.planes * g.size[0] + g.size[1]) for g in masked),
        trusted_bytes=sum(_secrets(g, split) for g in masked)
        + sum(FLOAT * g.weights for g in whole)
        + model.stored * model.table
        + caches[False],
        edge_bytes=sum(split.planes * g.size[0] * g.size[1] for g in masked)
        + sum(FLOAT * g.weights for g, place in placed(model, where) if place == "open")
        + caches[True],
        pad_bytes=pads,
        stock_bytes=(pads + KEY_BYTES * len(masked)) * work.prompt * work.streams,
        helpers=math.ceil(decode * max(making, pads / network.bandwidth)) if masked else 0,
    )


def _secrets(group: Group, split: Split) -> int:
    """Bytes of a masked group in the trusted bundle: factors in bfloat16, scales, secret bases, check vectors."""
    layout = Operator.layout(split.planes, *group.size, True)
    shared = sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
    return 2 * factors(group, split.rank) + shared
