"""The trusted arithmetic of one exchange: encode and mask an activation; unmask the answer and decode it.

docs/security.md, "The theorem for one exchange". Pads come in as arguments; using each one once is the caller's duty
(`sliplm.pads`). Encoding masks and decoding unmasks in the same pass over memory. Both have a native version and a
numpy one with the same meaning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sliplm import field
from sliplm._core import native
from sliplm.errors import NumericsError

if TYPE_CHECKING:
    from sliplm.exchange.operator import Operator

SAFETY = 1 - 1e-9


def amplitude(row_norm: float, width: int) -> float:
    """The largest length an encoded vector may have before rounding: c |x|, see `encode`.

    Raises NumericsError if a matrix of this width and row norm leaves no room at all for a signal.
    """
    length = (field.HALF / max(float(row_norm), 1.0) - math.sqrt(width) / 2) * SAFETY
    if not length > 0:
        raise NumericsError(f"a layer with {width} inputs and row norm {row_norm:.3g} leaves no room for a signal")
    return length


def encode(
    op: Operator, x: NDArray[np.float32], r: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Fixed point and mask: x (T, K) and pads r (T, K) give x~ = round(c v) + r mod p (T, K), and 1/c (T,).

    v is x in the secret basis `op.inner`, or x itself. R is `op.row_norm`, the largest Euclidean norm of a row of Q, in
    float64 (its square is an exact integer).

    No overflow, ever. Let v be as computed, rounding errors included, and x_q = round(c v) = c v + e, where
    |e| <= sqrt(K)/2. By Cauchy-Schwarz |Q_i x_q| <= R (c |v| + sqrt(K)/2), which is at most (p-1)/2 for
    c = ((p-1)/2 / R - sqrt(K)/2) / |v|. In float64 |v|, R, c and c v are each off by a factor of less than
    1 + K 2^-52 < 1 + 2^-36 (K < 2^16), all together by less than the 1 - 10^-9 by which c is shrunk.

    Raises NumericsError if x holds a NaN or an infinity, or if R and K leave no room (`amplitude`).
    """
    if native is not None:
        masked: NDArray[np.uint32] = np.empty(x.shape, np.uint32)
        inv_c = np.empty(len(x), np.float64)
        x, r = np.ascontiguousarray(x), np.ascontiguousarray(r)
        finite = native.encode(x, r, op.length, op.maps[0], masked, inv_c)
    else:
        masked, inv_c, finite = _encode(op, x, r)
    if not finite:
        raise NumericsError("an activation is not a finite number")
    return masked, inv_c, field.dot(op.uq, field.sub(masked, r))


def decode(
    op: Operator,
    answer: NDArray[np.uint32],
    image: NDArray[np.uint32],
    inv_c: NDArray[np.float64],
    expected: NDArray[np.uint32],
    out: NDArray[np.float32],
) -> bool:
    """Unmask and scale: answer (T, M) and the pads' image Q r (T, M) give the edge's part of y, added to `out` (T, N).

    `inv_c` (T,) is from `encode`; the basis of the outputs is undone. Computed in float64, rounded once to float32.
    """
    if answer.dtype != np.uint32 or answer.shape != (len(out), op.shape[0]):
        return False
    ok = field.is_canonical(answer) and field.is_canonical(image)
    ok = ok and bool((field.dot(op.u, field.sub(answer, image)) == expected).all())
    if native is not None:
        answer, image = np.ascontiguousarray(answer), np.ascontiguousarray(image)
        native.decode(answer, image, op.scales, inv_c, op.maps[1], out)
    else:
        out += _decode(op, answer, image, inv_c)
    return ok


def _encode(
    op: Operator, x: NDArray[np.float32], r: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.float64], bool]:
    v: NDArray[Any] = x.astype(np.float64)
    if not np.isfinite(v).all():
        return r, np.ones(len(x)), False
    if op.inner is not None:
        v = op.inner.apply(v)
    norm = np.sqrt((v * v).sum(axis=1))
    c = np.where(norm > 0, op.length / np.where(norm > 0, norm, 1), 1.0)
    return field.add(field.lift(np.rint(v * c[:, None]).astype(np.int64)), r), 1 / c, True


def _decode(
    op: Operator, answer: NDArray[np.uint32], image: NDArray[np.uint32], inv_c: NDArray[np.float64]
) -> NDArray[np.float32]:
    z = field.centre(field.sub(answer, image)).reshape(-1, *op.scales.shape)
    t: NDArray[Any] = inv_c[:, None] * np.einsum("tjn,jn->tn", z, op.scales, dtype=np.float64)
    y: NDArray[np.float32] = (t if op.outer is None else op.outer.invert(t)).astype(np.float32)
    return y
