"""Line up the singular vectors of what a thief reads with those of a matrix that it knows.

No change of basis moves singular values, so their order tells which direction goes to which; up to signs, and as far
as neighbours do not mix. Three things blur that order, and the thief fights two of them. Rows of unknown scale: the
thief chooses scales that make the spectrum the one it expects (`equalise`). Values that the camouflage planted: it
looks for the best monotone matching that may leave values out (`match`), as biologists align sequences (Needleman and
Wunsch, 1970). A secret diagonal between two rotations: there is no row to scale, and nothing is done about it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_SPREAD = 0.03  # standard deviation of what equal rows leave unknown of their scales
_TRUST = 0.002  # relative to the root mean square: how far singular values are believed to be off


class Triplets(NamedTuple):
    """left (N, d), values (d,) descending, right (K, d)."""

    left: Array
    values: Array
    right: Array

    def take(self, index: NDArray[np.int64]) -> Triplets:
        """Those of `index`, in its order."""
        return Triplets(self.left[:, index], self.values[index], self.right[:, index])


def triplets(matrix: Array) -> Triplets:
    """All with a value above 1e-5 of the largest, from the Gram matrix of the shorter side of `matrix` (N, K)."""
    if len(matrix) < matrix.shape[1]:
        right, values, left = triplets(matrix.T)
        return Triplets(left, values, right)
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    values = values[values > 1e-5 * values[0]]
    vectors = vectors[:, ::-1][:, : len(values)]
    return Triplets(matrix @ vectors / values, values, vectors)


def equalise(matrix: Array, values: Array, steps: int = 10) -> Array:
    """`matrix` (N, K) with its rows scaled such that its singular values come near to `values` (d,): Gauss-Newton for
    scales near 1, of which there are as many or more than values."""
    scale = np.ones(len(matrix))
    noise = (_TRUST / _SPREAD) ** 2 * np.mean(values**2)
    for _ in range(steps):
        found = triplets(matrix * scale[:, None])
        d = min(len(values), len(found.values))
        jacobian = ((found.left**2 * found.values)[:, :d] / scale[:, None]).T
        missing = values[:d] - found.values[:d] + jacobian @ (scale - 1)
        system = jacobian @ jacobian.T + noise * np.eye(d)
        scale += np.clip(1 + jacobian.T @ np.linalg.solve(system, missing) - scale, -_SPREAD, _SPREAD)
    return matrix * scale[:, None]


def match(values: Array, known: Array, skip: float = 3.0) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Which of `values` (n,) goes to which of `known` (m,), both descending: the cheapest monotone matching, its cost.

    A pair costs the square of its logarithms' difference, in units of the local gap between neighbours; a value left
    out on either side costs `skip`.
    """
    a, b = np.log(values + 1e-3 * values[0]), np.log(known + 1e-3 * known[0])
    gap = np.convolve(np.pad(np.abs(np.gradient(b)), 8, mode="edge"), np.ones(17) / 17, "valid") + 1e-6
    ramp = skip * np.arange(len(b) + 1)
    best, rows = ramp.copy(), []
    for value in a:
        down = best + skip
        pair = best[:-1] + ((value - b) / gap) ** 2
        now = down.copy()
        now[1:] = np.minimum(now[1:], pair)
        best = np.minimum.accumulate(now - ramp) + ramp  # leave out known ones
        rows.append((now > best + 1e-9, np.append(False, pair <= down[1:])))
    i, j, pairs = len(a), len(b), []
    while i and j:
        skipped, paired = rows[i - 1]
        if skipped[j]:
            j -= 1
        else:
            if paired[j]:
                pairs.append((i - 1, j - 1))
                j -= 1
            i -= 1
    left, right = np.array(pairs[::-1], np.int64).reshape(-1, 2).T
    return left, right, float(best[-1])


def line_up(stolen: Array, known: Array, planted: bool, scales: bool) -> tuple[Triplets, Triplets]:
    """Triplets of `stolen` and of `known` (N, K), one for one.

    `planted`: some of the stolen values have no counterpart. `scales`: the rows of `stolen` have their true scales.
    """
    there = triplets(known)
    if not scales:
        stolen = stolen / np.maximum(np.linalg.norm(stolen, axis=1, keepdims=True), 1e-30)
        stolen = stolen * (np.linalg.norm(known) / np.sqrt(len(stolen)))
    if not planted:
        here = triplets(stolen if scales else equalise(stolen, there.values))
        both = np.arange(min(len(here.values), len(there.values)))
        return here.take(both), there.take(both)
    here = triplets(stolen)
    if not scales:
        size = np.median(there.values) / np.median(here.values) * np.linspace(0.95, 1.05, 41)
        stolen = stolen * size[np.argmin([match(here.values * s, there.values)[2] for s in size])]
        for _ in range(2):
            here = triplets(stolen)
            i, j, _cost = match(here.values, there.values)
            wanted = here.values.copy()
            wanted[i] = there.values[j]
            stolen = equalise(stolen, wanted, 8)
        here = triplets(stolen)
    i, j, _cost = match(here.values, there.values)
    return here.take(i), there.take(j)
