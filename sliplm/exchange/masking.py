"""The trusted arithmetic of one exchange: encode and mask an activation, check the answer, unmask it, decode.

The proof is in docs/security.md, "The theorem for one exchange". Pads come in as arguments; using each one once is the
caller's duty (`sliplm.pads`). Every function has a native version and a numpy one with the same meaning.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sliplm import field
from sliplm._core import native
from sliplm.errors import NumericsError
from sliplm.split.blinding import Blinding

SAFETY = 1 - 1e-9


@lru_cache(maxsize=4096)
def amplitude(row_norm: float, width: int) -> float:
    """The largest length an encoded vector may have before rounding: c |x|, see `encode`.

    Raises NumericsError if a matrix of this width and row norm leaves no room at all for a signal.
    """
    length = (field.HALF / max(float(row_norm), 1.0) - math.sqrt(width) / 2) * SAFETY
    if not length > 0:
        raise NumericsError(f"a layer with {width} inputs and row norm {row_norm:.3g} leaves no room for a signal")
    return length


def encode(
    x: NDArray[np.float32], r: NDArray[np.uint32], row_norm: float, blinding: Blinding | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Fixed point and mask: x (T, K) and pads r (T, K) give x~ = round(c v) + r mod p (T, K), and 1/c (T,).

    v is `blinding` applied to x, or x itself. `row_norm` is R, the largest Euclidean norm of a row of Q, in
    float64 (its square is an exact integer).

    No overflow, ever. Let v be as computed, rounding errors included, and x_q = round(c v) = c v + e, where
    |e| <= sqrt(K)/2. By Cauchy-Schwarz |Q_i x_q| <= R (c |v| + sqrt(K)/2), which is at most (p-1)/2 for
    c = ((p-1)/2 / R - sqrt(K)/2) / |v|. In float64 |v|, R, c and c v are each off by a factor of less than
    1 + K 2^-52 < 1 + 2^-36 (K < 2^16), all together by less than the 1 - 10^-9 by which c is shrunk.

    Raises NumericsError if x holds a NaN or an infinity, or if R and K leave no room (`amplitude`).
    """
    length = amplitude(row_norm, x.shape[1])
    if native is not None:
        masked = np.empty(x.shape, np.uint32)
        inv_c = np.empty(x.shape[0], np.float64)
        finite = native.encode(np.ascontiguousarray(x), np.ascontiguousarray(r), length, _map(blinding), masked, inv_c)
    else:
        masked, inv_c, finite = _encode(x, r, length, blinding)
    if not finite:
        raise NumericsError("an activation is not a finite number")
    return masked, inv_c


def verify(
    u: NDArray[np.uint32], uq: NDArray[np.uint32], masked: NDArray[np.uint32], answer: NDArray[np.uint32]
) -> bool:
    """Freivalds' check of answer (T, M) = Q masked (T, K), with secret u (C, M) and uq = u Q (C, K).

    True iff the answer is canonical and <u_i, answer_t> = <uq_i, masked_t> mod p for all i and t. A wrong
    answer passes with probability p^-C over u (Freivalds 1977; docs/security.md). Everything is evaluated,
    whatever fails first.
    """
    if answer.dtype != np.uint32 or answer.shape != (masked.shape[0], u.shape[1]):
        return False
    if native is not None:
        return bool(native.verify(u, uq, masked, np.ascontiguousarray(answer)))
    canonical = field.is_canonical(answer)
    return bool((field.dot(u, answer) == field.dot(uq, masked)).all()) and canonical


def decode(
    answer: NDArray[np.uint32],
    image: NDArray[np.uint32],
    scales: NDArray[np.float32],
    inv_c: NDArray[np.float64],
    blinding: Blinding | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Unmask and scale: answer (T, M) and the pads' image Q r (T, M) give the edge's part of y, (T, N).

    `scales` (planes, N) with planes * N = M, rows plane by plane; `inv_c` (T,) from `encode`; the outputs'
    `blinding` is undone. Computed in float64, rounded once to float32; added to `out` (T, N) if that is given.
    """
    if out is None:
        out = np.zeros((answer.shape[0], scales.shape[1]), np.float32)
    if native is not None:
        secret = _map(blinding)
        native.decode(np.ascontiguousarray(answer), np.ascontiguousarray(image), scales, inv_c, secret, out)
    else:
        out += _decode(answer, image, scales, inv_c, blinding)
    return out


def _map(blinding: Blinding | None) -> Any:
    """What the native core takes for it: permutations, turns, diagonal."""
    return None if blinding is None else (blinding.perm, blinding.turns, blinding.diagonal)


def _encode(
    x: NDArray[np.float32], r: NDArray[np.uint32], length: float, blinding: Blinding | None
) -> tuple[NDArray[np.uint32], NDArray[np.float64], bool]:
    v: NDArray[Any] = x.astype(np.float64)
    if not np.isfinite(v).all():
        return r, np.ones(len(x)), False
    if blinding is not None:
        v = blinding.apply(v)
    norm = np.sqrt((v * v).sum(axis=1))
    c = np.where(norm > 0, length / np.where(norm > 0, norm, 1), 1.0)
    return field.add(field.lift(np.rint(v * c[:, None]).astype(np.int64)), r), 1 / c, True


def _decode(
    answer: NDArray[np.uint32],
    image: NDArray[np.uint32],
    scales: NDArray[np.float32],
    inv_c: NDArray[np.float64],
    blinding: Blinding | None,
) -> NDArray[np.float32]:
    planes, n = scales.shape
    z = field.centre(field.sub(answer, image)).reshape(-1, planes, n)
    t: NDArray[Any] = inv_c[:, None] * np.einsum("tjn,jn->tn", z, scales, dtype=np.float64)
    y: NDArray[np.float32] = (t if blinding is None else blinding.invert(t)).astype(np.float32)
    return y
