"""Find the signs of matched singular vectors, and with them a rotation, from what its entries can be.

T (K, K) is the secret rotation of one side, its last public transform undone. A thief holds Y = T V R^T (K, d): V (K,
d) are the public model's singular vectors and R (d, d) is near to a diagonal of signs times r (d,), how well each was
matched. Column c of T is then about Y (signs * r * V[c]), and entries of T come from a known distribution (`Entries`).
So signs say what T is, as far as they are known, and T, as far as its entries are known, says what the signs are.
Source: the approximate message passing of Donoho, Maleki and Montanari (PNAS 2009) for signs; vector message passing
(Rangan, Schniter and Fletcher, arXiv 1610.03082) for the rest of R. A start is needed: a column that few directions
hold. Trained matrices have singular vectors that are almost one coordinate, which show one column of T whole
(`seeds`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
_CLIP = 60.0


@dataclass(frozen=True)
class Entries:
    """What one entry of T is: `size` with probability `chance` (1-D both), up to sign, and 0 otherwise; if `normal`, a
    normal number of that standard deviation in place of a constant."""

    size: Array
    chance: Array
    normal: bool = False

    @classmethod
    def of(cls, blocks: list[int], normal: bool) -> Entries:
        """Of a rotation with Hadamard blocks of these sizes: two rounds of signs, or, if `normal`, any rotation."""
        n = sum(blocks)
        if normal:
            return cls(np.array([n**-0.5], np.float32), np.ones(1, np.float32), True)
        sizes = sorted(set(blocks))
        chance = [(blocks.count(b) * (b / n) ** 2) for b in sizes]
        return cls(np.array(sizes, np.float32) ** np.float32(-0.5), np.array(chance, np.float32))

    def posterior(self, seen: Array, gain: Any, noise: Any) -> tuple[Array, Array, Array]:
        """Of entries `seen` (K, ...) as gain * entry + noise of variance `noise` (both broadcast): mean, variance
        and the log-likelihood ratio against noise alone."""
        if self.normal:
            wide = noise + (gain * self.size[0]) ** 2
            mean = seen * gain * self.size[0] ** 2 / wide
            ratio = 0.5 * np.log(noise / wide) + seen**2 / 2 * (1 / noise - 1 / wide)
            return mean, np.broadcast_to(noise * self.size[0] ** 2 / wide, seen.shape), ratio
        total = np.full_like(seen, 1 - self.chance.sum())
        first, second = np.zeros_like(seen), np.zeros_like(seen)
        slope = seen * (gain / noise)
        for a, p in zip(self.size, self.chance, strict=True):
            fixed = (gain * a) ** 2 / (2 * noise)
            up = np.exp(np.clip(a * slope - fixed, -_CLIP, _CLIP))
            down = np.exp(np.clip(-a * slope - fixed, -_CLIP, _CLIP))
            total += p / 2 * (up + down)
            first += p / 2 * a * (up - down)
            second += p / 2 * a * a * (up + down)
        mean = first / total
        return mean, second / total - mean**2, np.log(total)


@dataclass(frozen=True)
class Side:
    """Inputs or outputs: `seen` Y (K, d), `known` V (K, d), and what entries of T may be."""

    seen: Array
    known: Array
    entries: Entries

    def estimate(self, mixing: Array) -> Array:
        """T (K, K) if R is `mixing`: its diagonal (d,), or all of it (d, d)."""
        return (self.seen * mixing if mixing.ndim == 1 else self.seen @ mixing) @ self.known.T


@dataclass(frozen=True)
class Seed:
    """A guess at column `column` of T of `side`: `value` (K,), with `gain`, the log-likelihood that speaks for it."""

    side: Side
    column: int
    value: Array
    gain: float


def trust(values: NDArray[np.float64], aligned: float) -> tuple[Array, Array]:
    """How well each direction is matched, r (d,), and how much of R is expected where, (d, d) mean squares, if the mean
    of r^2 is `aligned`: what is perturbed mixes neighbours by the inverse of the gap between their `values` (d,)."""
    gap = np.abs(np.subtract.outer(values, values))
    np.fill_diagonal(gap, np.inf)
    low, high = 1e-7 * values.mean(), 10 * values.mean()
    for _ in range(60):
        size = np.sqrt(low * high)
        mixed = size**2 / (gap**2 + size**2 / 2)
        kept = 1 / (1 + mixed.sum(1))
        low, high = (size, high) if kept.mean() > aligned else (low, size)
    mixed *= np.sqrt(np.outer(kept, kept))
    np.fill_diagonal(mixed, kept)
    return np.sqrt(kept).astype(np.float32), np.maximum(mixed, 1e-7).astype(np.float32)


def seeds(sides: list[Side], r: Array, count: int = 4, together: tuple[int, ...] = (1, 4, 9)) -> list[Seed]:
    """The likeliest columns first: of each side's `count` coordinates that few directions hold, from so many `together`
    under all their signs."""
    found = []
    for side in sides:
        energy = side.known**2
        held = np.sort(energy, 1)[:, ::-1][:, :4].sum(1)
        for column in np.argsort(-held)[:count]:
            best: Seed | None = None
            for few in together:
                j = np.argsort(-energy[column])[:few]
                signs = np.array([(1, *others) for others in product((1, -1), repeat=few - 1)], np.float32)
                seen = side.seen[:, j] @ (signs * side.known[column, j] * r[j]).T
                gain = np.float32(np.sum(r[j] ** 2 * energy[column, j]))
                noise = np.maximum((seen**2).mean(0) - gain**2 / len(seen), 1e-3 / len(seen))
                mean, _, ratio = side.entries.posterior(seen, gain, noise)
                score = ratio.sum(0) - few * np.log(2)
                k = int(score.argmax())
                if best is None or score[k] > best.gain:
                    best = Seed(side, int(column), mean[:, k], float(score[k]))
            found.append(best)
    return sorted((s for s in found if s), key=lambda s: -s.gain)


def signs(sides: list[Side], start: list[tuple[Seed, int]], r: Array, steps: int = 45) -> Array:
    """Means (d,) of the signs. `start`: seeds, each with a sign of its own."""
    nearby = [_smooth(side.known**2) for side in sides]
    push = np.zeros(len(r), np.float32)
    for seed, sign in start:
        at = next(i for i, side in enumerate(sides) if side is seed.side)
        sure = min(float(seed.value @ seed.value), 0.9995)
        blur = (1 - sure) / len(seed.value) + sure * (1 - r**2) * nearby[at][seed.column] + 1e-9
        push += sign * r * seed.side.known[seed.column] * (seed.side.seen.T @ seed.value) / blur
    mean = np.tanh(np.clip(0.7 * push, -3, 3))
    known = [(seed, sign) for seed, sign in start if seed.value @ seed.value > 0.9]
    for step in range(steps):
        push = np.zeros_like(mean)
        for side, near in zip(sides, nearby, strict=True):
            energy = side.known**2
            gain = np.clip(energy @ (r * mean) ** 2, 1e-4, 0.9999)
            noise = np.maximum(gain - gain**2, 1e-4) / len(energy)
            column, blur, _ = side.entries.posterior(side.estimate(mean * r), gain, noise)
            slope = (gain / noise * blur).mean(0)
            for seed, sign in known:
                if seed.side is side:
                    column[:, seed.column], slope[seed.column] = sign * seed.value, 0
            right = np.clip((column**2).sum(0), 1e-6, 0.9995)
            heard = (side.seen.T @ column) * side.known.T - (r * mean)[:, None] * (energy * slope[:, None]).T
            spread = (1 - right) / len(energy) + (right[:, None] * near).T * (1 - r**2)[:, None] + 1e-9
            push += r * (heard / spread).sum(1)
        mean = (0.7 * mean + 0.3 * np.tanh(np.clip(push, -15, 15))).astype(np.float32)
        decided = float((mean**2).mean())
        if step > 20 and (decided > 0.995 or decided < 0.02):
            break
    return mean


def rotations(sides: list[Side], mixing: Array, expected: Array, steps: int = 30) -> list[Array]:
    """T of each side, from a first estimate (d, d) of R and the mean squares `expected` of its entries."""
    share = float(np.clip((mixing**2).sum() / len(mixing), 1e-3, 0.98))
    state = [(side.estimate(mixing / share), (1 - share) / (share * len(side.known))) for side in sides]
    before = np.inf
    found: list[tuple[Array, float]] = []
    for _ in range(steps):
        found, heard = [], []
        for side, (seen, noise) in zip(sides, state, strict=True):
            gain, least = _fit(side, seen)
            seen, noise = seen / gain, max(noise, float(least / gain**2))
            mean, blur, _ = side.entries.posterior(seen, np.float32(1), np.float32(noise))
            variance = min(max(float(blur.mean()), 1e-9), 0.98 * noise)
            extrinsic = 1 / (1 / variance - 1 / noise)
            heard.append((side.seen.T @ (extrinsic * (mean / variance - seen / noise)) @ side.known, extrinsic))
            found.append((mean, variance * len(seen)))
        precision = 1 / expected + sum(1 / e for _, e in heard)
        mixing = sum(h / e for h, e in heard) / precision  # type: ignore[assignment]
        for i, (side, (h, e)) in enumerate(zip(sides, heard, strict=True)):
            variance = min(float((1 / precision).mean()), 0.98 * e)
            extrinsic = 1 / (1 / variance - 1 / e)
            seen = side.estimate((extrinsic * (mixing / variance - h / e)).astype(np.float32))
            state[i] = 0.3 * state[i][0] + 0.7 * seen, max(0.3 * state[i][1] + 0.7 * extrinsic, 1e-7)
        now = max(left for _, left in found)
        if now < 1e-4 or abs(now - before) < 1e-6:
            break
        before = now
    return [mean for mean, _ in found]


def _fit(side: Side, seen: Array) -> tuple[np.float32, np.float32]:
    """Gain and variance of the noise that make `seen` (K, K) likeliest."""
    power = float((seen**2).mean())
    some = seen.ravel()[::61]
    best: tuple[float, Any, Any] = (-np.inf, 1.0, 1.0)
    for share in np.linspace(0.02, 0.995, 60):
        gain, noise = np.float32(np.sqrt(share * power * len(seen))), np.float32((1 - share) * power)
        ratio = side.entries.posterior(some, gain, noise)[2]
        best = max(best, (float((ratio - some**2 / (2 * noise)).sum() - len(some) / 2 * np.log(noise)), gain, noise))
    return best[1], best[2]


def _smooth(energy: Array, width: int = 6) -> Array:
    """Each row's mean over the neighbours of a place, itself left out."""
    wide = np.pad(energy, ((0, 0), (width, width)), mode="edge")
    total = np.cumsum(np.pad(wide, ((0, 0), (1, 0))), 1, dtype=np.float64)
    window = total[:, 2 * width + 1 :] - total[:, : -2 * width - 1]
    return ((window - energy) / (2 * width)).astype(np.float32)
