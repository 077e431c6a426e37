"""How fast two machines are, as far as a plan's cost depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sliplm.errors import SlipError


class Plain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine that computes blocks whole, in float32.

    Attributes:
        step: seconds of a pass around its blocks, as Transformers makes it: masks, positions, sampling.
        block, many: seconds of a block beside its weights, for one row and for many, for which threads wake each other.
        read: bytes of weights a second, for one row. multiply_adds: a second, for many rows.
    """

    step: float
    block: float
    many: float
    read: float
    multiply_adds: float


class Trusted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trusted side's machine.

    Attributes:
        step: seconds of a pass around its blocks, where all are masked: looking up, sampling.
        exchange: seconds of an exchange with next to no numbers in it, and of what lies around it in a block; on
            loopback, so the edge's half is in it.
        encode, decode: seconds a number sent and received: a pad's key is expanded in the former, the check is in both.
        tls: seconds a byte, one way.
        read: bytes of factors a second, for one row. multiply_adds: with factors, a second, for many rows.
    """

    step: float
    exchange: float
    encode: float
    decode: float
    tls: float
    read: float
    multiply_adds: float
    plain: Plain


class Edge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The edge's machine, and a helper's.

    Attributes:
        tls: seconds a byte, one way.
        read: bytes of Q a second, for one row. multiply_adds: with Q, modulo p, a second, for many rows.
    """

    tls: float
    read: float
    multiply_adds: float
    plain: Plain


class Speeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of both sides."""

    trusted: Trusted
    edge: Edge


_PLAIN = Plain(step=1e-3, block=600e-6, many=1e-3, read=16e9, multiply_adds=70e9)
USUAL = Speeds(
    Trusted(
        step=2e-3,
        exchange=110e-6,
        encode=4e-9,
        decode=4e-9,
        tls=0.7e-9,
        read=15e9,
        multiply_adds=30e9,
        plain=_PLAIN,
    ),
    Edge(tls=0.7e-9, read=25e9, multiply_adds=100e9, plain=_PLAIN),
)
"""Two cores of an AMD EPYC with AVX-512 for either side: what `slip plan --probe` found there."""


def read(path: Path) -> Speeds:
    """Speeds in a file of JSON, as `slip plan --probe --json` gives them under "speeds". Raises SlipError."""
    try:
        speeds = msgspec.json.decode(path.read_bytes(), type=Speeds)
    except OSError as error:
        raise SlipError(f"cannot read {path}: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        raise SlipError(f"{path} has no speeds as `slip plan --probe --json` gives them ({error}).") from None
    _check(msgspec.to_builtins(speeds))
    return speeds


def _check(values: dict[str, Any], name: str = "") -> None:
    """Raises SlipError if one of them is not above zero."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check(value, f"{name}{key}.")
        elif not value > 0:
            raise SlipError(f"{name}{key} is {value:g}: it has to be above zero.")
