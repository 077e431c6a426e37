"""An edge that lies: the real worker, with an answer now and then that is not the right one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sliplm.edge.connection import Lent
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import IdentityError, SlipError
from sliplm.field import P
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Header, Kind
from sliplm.protocol.messages import GenerateRequest

Field = NDArray[np.uint32]
Random = np.random.Generator

# --- wrong numbers in a well-formed answer --------------------------------------------------------------------------
# Each takes the right answer (T, M), a dictionary of what went before, and a source of randomness; and gives another
# answer, or None if it has none to give this time.


def _bit_flip(y: Field, _: dict[str, Field], rng: Random) -> Field:
    y = y.copy()
    y[rng.integers(len(y)), rng.integers(y.shape[1])] ^= np.uint32(1 << rng.integers(32))
    return y


def _off_by_one(y: Field, _: dict[str, Field], rng: Random) -> Field:
    y = y.copy()
    i = (rng.integers(len(y)), rng.integers(y.shape[1]))
    y[i] = (int(y[i]) + (1 if rng.random() < 0.5 else P - 1)) % P
    return y


def _not_canonical(y: Field, _: dict[str, Field], rng: Random) -> Field:
    """The right residue, but not below p."""
    y = y.copy()
    y[rng.integers(len(y)), rng.integers(y.shape[1])] += np.uint32(P)
    return y


def _zero(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return np.zeros_like(y)


def _negative(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return np.where(y == 0, 0, P - y).astype(np.uint32)


def _double(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return (2 * y.astype(np.uint64) % P).astype(np.uint32)


def _random(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return rng.integers(0, P, y.shape).astype(np.uint32)


def _replayed(y: Field, past: dict[str, Field], rng: Random) -> Field | None:
    """The previous answer of the same group, or one of an earlier request."""
    return past.get("previous")


def _stale(y: Field, past: dict[str, Field], rng: Random) -> Field | None:
    """The first answer that this group ever gave."""
    return past.get("first")


def _other_group(y: Field, past: dict[str, Field], rng: Random) -> Field | None:
    """The answer of another group of the same shape."""
    return past.get("elsewhere")


def _swapped_rows(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return np.roll(y, 1, axis=0)


def _swapped_columns(y: Field, _: dict[str, Field], rng: Random) -> Field:
    return np.roll(y, 1, axis=1)


def _other_question(y: Field, past: dict[str, Field], rng: Random) -> Field | None:
    """y + y', the exact answer to x + x'."""
    other = past.get("previous")
    return None if other is None else ((y.astype(np.uint64) + other) % P).astype(np.uint32)


NUMBERS: dict[str, Callable[[Field, dict[str, Field], Random], Field | None]] = {
    "bit flip": _bit_flip,
    "off by one": _off_by_one,
    "not canonical": _not_canonical,
    "zero": _zero,
    "negative": _negative,
    "double": _double,
    "random": _random,
    "replayed": _replayed,
    "stale": _stale,
    "another group's": _other_group,
    "rows swapped": _swapped_rows,
    "columns swapped": _swapped_columns,
    "to another question": _other_question,
}

# --- wrong frames ---------------------------------------------------------------------------------------------------
# Each sends an answer that claims to be something else than it is.


def _send(channel: Channel, header: Header, y: Field, **changes: int) -> None:
    group = changes.get("group", header.group)
    sequence = changes.get("sequence", header.sequence)
    staged = channel.stage(*y.shape)
    staged[:] = y
    channel.send_staged(Kind.RESULT, group, sequence & 0xFFFFFFFF, staged)


FRAMES: dict[str, Callable[[Channel, Header, Field], None]] = {
    "a row more": lambda c, h, y: _send(c, h, np.concatenate([y, y[:1]])),
    "a column more": lambda c, h, y: _send(c, h, np.concatenate([y, y[:, :1]], axis=1)),
    "a column less": lambda c, h, y: _send(c, h, y[:, :-1]),
    "transposed": lambda c, h, y: _send(c, h, np.concatenate([y, y]).reshape(-1, len(y)).copy()),
    "another number": lambda c, h, y: _send(c, h, y, sequence=h.sequence + 1),
    "the number before": lambda c, h, y: _send(c, h, y, sequence=h.sequence - 1),
    "for another group": lambda c, h, y: _send(c, h, y, group=h.group ^ 1),
    "out of turn": lambda c, h, y: c.send(Kind.PONG, sequence=h.sequence),
}

LIES = [*NUMBERS, *FRAMES]


class Undeterred(Lent):
    """One to whom being suspended is a reason to try again, as to a thief who hopes for better times."""

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping.is_set():
            try:
                super().run()
            except IdentityError:
                self._stopping.wait(0.05)


class Liar(Undeterred, EdgeWorker):
    """Answers rightly, until it is told to `lie`.

    Attributes:
        told: how many lies it told.
    """

    def __init__(self, engine: Multiplier, address: str, identity: Any, seed: int) -> None:
        super().__init__(engine, address, identity)
        self.told = 0
        self._rng = np.random.default_rng(seed)
        self._lie: tuple[str, int] | None = None
        self._asked = threading.Lock()
        self._last: dict[tuple[int, tuple[int, ...]], Field] = {}
        self._first: dict[tuple[int, tuple[int, ...]], Field] = {}

    def lie(self, kind: str | None, after: int = 0) -> None:
        """From now on let `after` answers be right, and the next one that allows it a lie of this kind; or no more."""
        with self._asked:
            self._lie = None if kind is None else (kind, after)

    def _answer(self, channel: Channel, header: Header) -> None:
        k = self._engine.shapes[header.group][1]
        x = np.empty((header.rows, k), np.uint32)
        channel.read_array(x)
        y = self._engine.product(header.group, x)
        with self._asked:
            wrong, kind = self._wrong(header.group, y), self._lie and self._lie[0]
            if wrong is not None:
                self._lie, self.told = None, self.told + 1
        key = (header.group, y.shape)
        self._first.setdefault(key, y)
        self._last[key] = y
        if wrong is None:
            _send(channel, header, y)
        elif kind in FRAMES:
            FRAMES[kind](channel, header, y)
        else:
            _send(channel, header, wrong)

    def _wrong(self, group: int, y: Field) -> Field | None:
        """What to say instead of `y`, if it is time for a lie."""
        if self._lie is None:
            return None
        kind, after = self._lie
        if after > 0:
            self._lie = (kind, after - 1)
            return None
        if kind in FRAMES:
            return y
        past = {"previous": self._last.get((group, y.shape)), "first": self._first.get((group, y.shape))}
        past["elsewhere"] = next((v for (g, s), v in self._last.items() if s == y.shape and g != group), None)
        wrong = NUMBERS[kind](y, {name: value for name, value in past.items() if value is not None}, self._rng)
        return wrong if wrong is not None and not np.array_equal(wrong, y) else None

    def request(self, prompt: str, max_tokens: int) -> tuple[str, Exception | None]:
        """Ask the trusted side for text, greedy: what came, and how it ended if not well."""
        text = ""
        try:
            with self.generate(GenerateRequest(prompt=prompt, max_tokens=max_tokens)) as chunks:
                for chunk in chunks:
                    text += chunk.text
        except SlipError as error:
            return text, error
        return text, None
