"""Undo the blinding with a public model that is close to the protected one.

Threat model: the thief has a public base of which the owner made a fine-tune, and reads one group's matrix. Steps:

1. *Align*: make rows even, match singular vectors with the base's (`alignment`).
2. *Undo the public part*: the last Hadamard transform. What is left, T, has entries of a known distribution.
3. *Seed*: a singular vector that is almost one coordinate shows a column of T.
4. *Message passing* finds the signs of all matched vectors, and from them T (`message_passing`).

It undoes two rounds of signed permutations and Hadamard transforms (bundle format 2), whose T has entries 0 and
+-1/sqrt(B): in seconds a matrix, at fine-tunes of relative size 0.5 to 5 %. Against four rounds with angles, the thief
tries constant entries and normal ones. Sides that are longer than the rank of the matrix are left alone: only the
shorter is determined by what is read. Source: a cryptanalysis of this package; the two files name what it builds on.
Oracles: the public base; the rows' scales, if given. The secret blindings score the result."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.attacks import message_passing
from sliplm.attacks.alignment import Triplets, line_up
from sliplm.attacks.message_passing import Entries, Side
from sliplm.split.blinding import block_sizes, hadamard

GUESSES = (0.9, 0.4)  # mean squared cosines of matched directions that the thief tries
_SURE = 0.85  # of what it found: the thief looks no further
_DECIDED = 0.1  # mean square of the signs below which there is nothing to go on with
_LEAST = 20.0  # log-likelihood of a seed that is taken beside the first


class Secret(Protocol):
    """A blinding, as far as it scores the result."""

    def apply(self, x: torch.Tensor) -> torch.Tensor: ...

    def dual(self) -> Any: ...


class Score(NamedTuple):
    """alignment: mean squared cosine of matched directions with their images, on the better side. signs: |mean of sign
    times true sign|. rotation: correlation with the true one, on the better side."""

    alignment: float
    signs: float
    rotation: float


@dataclass(frozen=True)
class Guess:
    """What a thief made of a matrix: matched triplets, means of their signs (d,), T (n, n) of inputs (0) and of outputs
    (1), and how sure it is, from 0 to 1: whether the signs are decided and T is orthogonal."""

    here: Triplets
    there: Triplets
    signs: NDArray[np.float32]
    turned: dict[int, NDArray[np.float32]]
    sure: float

    def score(self, inner: Secret, outer: Secret) -> Score:
        """Against the true blindings of inputs and of outputs."""
        maps = inner.dual(), outer  # what rows and what columns of the matrix went through
        cosines = [
            (seen * _images(known, secret)).sum(0)
            for seen, known, secret in zip(
                (self.here.right, self.here.left), (self.there.right, self.there.left), maps, strict=True
            )
        ]
        right = [0.0]
        for i, turned in self.turned.items():
            truth = hadamard(maps[i].apply(torch.eye(len(turned)))).numpy().T
            size = np.linalg.norm(turned) * np.linalg.norm(truth)
            right.append(abs(float((turned * truth).sum() / max(size, 1e-30))))
        signs = abs(float((self.signs * np.sign(cosines[0] + cosines[1])).mean()))
        return Score(max(float((c**2).mean()) for c in cosines), signs, max(right))


def attack(
    stolen: torch.Tensor,
    base: torch.Tensor,
    planted: bool = False,
    scales: bool = False,
    normal: bool = False,
    guesses: tuple[float, ...] = GUESSES,
) -> Guess:
    """Try to undo the blinding of `stolen` (N, K).

    Args:
        base: what the thief takes the edge's part for (N, K): the public matrix, or in a split without `--base` that
            without its leading components.
        planted: singular values have been planted: a split without `--base`.
        scales: the rows of `stolen` have their true scales.
        normal: take the entries of T for normal numbers, as after many rounds; else for those of two rounds.
    """
    here, there = line_up(stolen.double().numpy(), base.double().numpy(), planted, scales)
    sides: dict[int, Side] = {}
    for i, (seen, known) in enumerate(((here.right, there.right), (here.left, there.left))):
        n, d = known.shape
        if d > 0.9 * n:  # matched directions span most of it
            undone = hadamard(seen.T.copy()).T
            sides[i] = Side(undone.astype(np.float32), known.astype(np.float32), Entries.of(block_sizes(n), normal))
    best = Guess(here, there, np.zeros(len(there.values), np.float32), {}, 0.0)
    for guess in guesses if sides else ():
        r, expected = message_passing.trust(there.values, guess)
        for signs in _signs(list(sides.values()), r):
            decided = float((signs**2).mean())
            if decided < max(_DECIDED, best.sure):
                continue
            turned = message_passing.rotations(list(sides.values()), np.diag(signs * r), expected)
            sure = decided * max(map(_orthogonal, turned))
            if sure > best.sure:
                best = Guess(here, there, signs, dict(zip(sides, turned, strict=True)), sure)
            if sure > _SURE:
                return best
    return best


def _signs(sides: list[Side], r: NDArray[np.float32]) -> Any:
    """Means of the signs, for every way to combine the best three seeds."""
    found = message_passing.seeds(sides, r)
    chosen = [s for s in found[:3] if s.gain > _LEAST] or found[:1]
    for others in product((1, -1), repeat=len(chosen) - 1):
        yield message_passing.signs(sides, list(zip(chosen, (1, *others), strict=True)), r)


def _orthogonal(turned: NDArray[np.float32]) -> float:
    """1 if `turned` (n, n) is orthogonal up to a factor, 1 / n if it has rank one."""
    values = np.linalg.svd(turned, compute_uv=False)
    return float(values.sum() ** 2 / max(len(values) * (values**2).sum(), 1e-30))


def _images(directions: NDArray[np.float64], secret: Secret) -> NDArray[np.float64]:
    """Where `directions` (n, d) went, at length 1."""
    images: NDArray[np.float64] = secret.apply(torch.from_numpy(directions.T.copy())).numpy().T
    return images / np.linalg.norm(images, axis=0)
