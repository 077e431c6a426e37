"""How fast two machines are, as far as a plan's cost depends on it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sliplm.errors import SlipError


class Trusted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trusted side's machine.

    Attributes:
        step: seconds of a pass around its blocks: looking up, sampling.
        exchange: seconds of an exchange with next to no numbers in it, and of what lies around it in a block; on
            loopback, so the edge's half is in it.
        block: seconds of a plain block with next to no weights.
        encode, decode: seconds a number sent and received; a pad's key is expanded in the former, the check is in both.
        tls: seconds a byte, one way.
        read: bytes a second of weights, for one row. multiply_adds: a second, in float32, for many rows.
    """

    step: float
    exchange: float
    block: float
    encode: float
    decode: float
    tls: float
    read: float
    multiply_adds: float


class Edge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The edge's machine, and a helper's.

    Attributes:
        tls: seconds a byte, one way.
        read: bytes of Q a second, for one row. products: multiply-adds of Q a second, for many rows.
        block, plain_read, multiply_adds: of open blocks, as the trusted side has them.
    """

    tls: float
    read: float
    products: float
    block: float
    plain_read: float
    multiply_adds: float


class Speeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of both sides."""

    trusted: Trusted
    edge: Edge


USUAL = Speeds(
    Trusted(
        step=1.5e-3,
        exchange=200e-6,
        block=600e-6,
        encode=5e-9,
        decode=4e-9,
        tls=0.8e-9,
        read=12e9,
        multiply_adds=100e9,
    ),
    Edge(tls=0.8e-9, read=20e9, products=60e9, block=600e-6, plain_read=12e9, multiply_adds=100e9),
)
"""Two cores of an AMD EPYC with AVX-512 on either side: what `slip plan --probe` found there."""


def read(path: Path) -> Speeds:
    """Speeds in a file of JSON, as `slip plan --probe --json` gives them under "speeds". Raises SlipError."""
    try:
        speeds = msgspec.json.decode(path.read_bytes(), type=Speeds)
    except OSError as error:
        raise SlipError(f"cannot read {path}: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        raise SlipError(f"{path} holds no speeds as `slip plan --probe --json` writes them ({error}).") from None
    check(speeds)
    return speeds


def check(speeds: Speeds) -> None:
    """Raises SlipError if one of them is not above zero."""
    for side, values in msgspec.to_builtins(speeds).items():
        for name, value in values.items():
            if not value > 0:
                raise SlipError(f"{side}.{name} is {value:g}, and a speed is above zero.")
