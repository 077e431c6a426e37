"""The trusted arithmetic of one exchange: encode and mask an activation; unmask the answer, check and decode it.

docs/security.md, "The theorem for one exchange". Pads come in as arguments; using each one once is the caller's duty
(`sliplm.pads`). Encoding masks, and decoding unmasks and checks, in the same pass over memory. Both have a native
version and a numpy one with the same meaning.
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
) -> tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.uint32]]:
    """Fixed point and mask: x (T, K) and pads r (T, K) give x~ = x_q + r mod p (T, K), with x_q = round(c v); 1/c (T,);
    and <u_i Q, x_q> mod p (T, CHECKS), which `decode` expects to find.

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
        inv_c, expected = np.empty(len(x), np.float64), np.empty((len(x), len(op.uq)), np.uint32)
        x, r = np.ascontiguousarray(x), np.ascontiguousarray(r)
        finite = native.encode(x, r, op.length, op.maps[0], op.uq, masked, inv_c, expected)
    else:
        masked, inv_c, expected, finite = _encode(op, x, r)
    if not finite:
        raise NumericsError("an activation is not a finite number")
    return masked, inv_c, expected


def decode(
    op: Operator,
    answer: NDArray[np.uint32],
    image: NDArray[np.uint32],
    inv_c: NDArray[np.float64],
    expected: NDArray[np.uint32],
    out: NDArray[np.float32],
) -> bool:
    """Unmask, check and scale: answer (T, M) and the pads' image Q r (T, M) give z = answer - image mod p, and that the
    edge's part of y, added to `out` (T, N); its basis is undone. `inv_c` (T,) and `expected` are from `encode`.

    Returns whether z is Q x_q: both are canonical arrays of that shape, and <u_i, z_t> = expected[t, i] mod p for all i
    and t. If not, `out` is spoiled and must not be used. A wrong z passes with probability p^-CHECKS over u (Freivalds
    1977; docs/security.md); errors of an answer and of an image that cancel leave z right. Everything is evaluated,
    whatever fails first. Computed in float64, rounded once to float32.
    """
    if answer.shape != (len(out), op.shape[0]) or image.shape != answer.shape:
        return False
    if answer.dtype != np.uint32 or image.dtype != np.uint32:
        return False
    if native is not None:
        answer, image = np.ascontiguousarray(answer), np.ascontiguousarray(image)
        return native.decode(answer, image, op.scales, inv_c, op.maps[1], op.u, expected, out)
    canonical = field.is_canonical(answer) & field.is_canonical(image)
    z = field.sub(answer, image)
    right = (field.dot(op.u, z) == expected).all()
    out += _decode(op, z, inv_c)
    return bool(canonical & right)


def _encode(
    op: Operator, x: NDArray[np.float32], r: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.uint32], bool]:
    v: NDArray[Any] = x.astype(np.float64)
    if not np.isfinite(v).all():
        return r, np.ones(len(x)), r, False
    if op.inner is not None:
        v = op.inner.apply(v)
    norm = np.sqrt((v * v).sum(axis=1))
    c = np.where(norm > 0, op.length / np.where(norm > 0, norm, 1), 1.0)
    encoded = field.lift(np.rint(v * c[:, None]).astype(np.int64))
    return field.add(encoded, r), 1 / c, field.dot(op.uq, encoded), True


def _decode(op: Operator, z: NDArray[np.uint32], inv_c: NDArray[np.float64]) -> NDArray[np.float32]:
    centred = field.centre(z).reshape(-1, *op.scales.shape)
    t: NDArray[Any] = inv_c[:, None] * np.einsum("tjn,jn->tn", centred, op.scales, dtype=np.float64)
    y: NDArray[np.float32] = (t if op.outer is None else op.outer.invert(t)).astype(np.float32)
    return y
