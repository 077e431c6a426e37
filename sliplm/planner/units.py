"""Durations, bandwidths and budgets as people write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sliplm.errors import SlipError

_NUMBER = r"(\d{1,9}(?:\.\d{1,6})?)"
_DURATION = re.compile(_NUMBER + "(us|ms|s)", re.ASCII)
_BANDWIDTH = re.compile(_NUMBER + "([kMG])bit", re.ASCII)
_BUDGET = re.compile(r"auto:(?:(\d{1,6})rt|" + _NUMBER + "(us|ms|s)|" + _NUMBER + "%)", re.ASCII)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS = {"k": 1e3, "M": 1e6, "G": 1e9}

BUDGETS = "auto:9rt (round trips a token), auto:200ms (a token) or auto:5% (of the model on the trusted side)"


def duration(text: str) -> float:
    """Seconds in "20ms", "1.5s" or "200us"; at most a minute. Raises SlipError."""
    found = _DURATION.fullmatch(text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else math.inf
    if seconds > 60:
        raise SlipError(f"{text[:40]!a} is no duration: write 20ms, 200us or 1.5s, at most 60s.")
    return seconds


def bandwidth(text: str) -> float:
    """Bytes a second in "1Gbit", "100Mbit" or "64kbit". Raises SlipError."""
    found = _BANDWIDTH.fullmatch(text)
    if not found or not float(found[1]):
        raise SlipError(f"{text[:40]!a} is no bandwidth: write 1Gbit, 100Mbit or 64kbit.")
    return float(found[1]) * _BITS[found[2]] / 8


def numbers(text: str) -> list[int]:
    """The numbers in "4,16,64", in order. Raises SlipError."""
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", text, re.ASCII):
        raise SlipError(f"{text[:40]!a} is no list of numbers from 1 on, such as 4,16,64.")
    return sorted({int(part) for part in text.split(",")})


def plans(text: str) -> list[str]:
    """The plans in "all,first:2,blocks:0-3,28,trusted:2". Raises SlipError if there are none."""
    found = re.split(r",(?=[a-z])", text)  # within blocks:0-3,28 a digit follows
    if not all(found):
        raise SlipError(f"{text[:40]!a} is no list of plans: write all,first:2,trusted:2.")
    return found


@dataclass(frozen=True)
class Budget:
    """The most that a token may cost: `kind` says what `limit` counts, round trips, seconds, or the share of the
    model's multiply-adds that the trusted side does (0 to 1)."""

    kind: Literal["round trips", "seconds", "trusted share"]
    limit: float


def budget(text: str) -> Budget:
    """The budget in "auto:9rt", "auto:200ms" or "auto:5%". Raises SlipError."""
    found = _BUDGET.fullmatch(text)
    if found and found[1]:
        return Budget("round trips", float(found[1]))
    if found and found[3]:
        return Budget("seconds", float(found[2]) * _SECONDS[found[3]])
    if found and float(found[4]) <= 100:
        return Budget("trusted share", float(found[4]) / 100)
    raise SlipError(f"{text[:40]!a} is no budget: write {BUDGETS}.")
