"""Arithmetic in F_p with p = 2^31 - 1: what is on the wire, the pads and the checks are all elements of it.

An array of field elements is uint32 with every value below p ("canonical"). Whoever receives an array from
outside asks `is_canonical` first; nothing else here looks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sliplm._core import native

P = 2**31 - 1
HALF = (P - 1) // 2

_P32 = np.uint32(P)


def is_canonical(x: NDArray[np.uint32]) -> bool:
    """Whether every element of `x` (any shape) is below p."""
    if native is not None and x.flags.c_contiguous:
        return bool(native.is_canonical(x.reshape(-1)))
    return bool((x < _P32).all())


def lift(x: NDArray[Any]) -> NDArray[np.uint32]:
    """The integers `x` (any shape, any integer type) modulo p."""
    result: NDArray[np.uint32] = np.mod(x, P).astype(np.uint32)
    return result


def centre(z: NDArray[np.uint32]) -> NDArray[np.int32]:
    """The representatives of `z` (any shape) in [-(p-1)/2, (p-1)/2]."""
    return z.astype(np.int32) - (z > HALF) * np.int32(P)


def add(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """a + b mod p, elementwise, with broadcasting."""
    total: NDArray[np.uint32] = a + b  # below 2^32
    total = np.minimum(total, total - _P32)  # where total < p, total - p wraps to something larger
    return total


def sub(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """a - b mod p, elementwise, with broadcasting."""
    difference: NDArray[np.uint32] = a - b  # wraps where a < b, and adding p wraps it back
    difference = np.minimum(difference, difference + _P32)
    return difference


def dot(u: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """<u, y_t> mod p, exactly: u (M,) and y (T, M) give (T,); u (C, M) gives (T, C).

    In float64, so that BLAS does it: both sides in halves of 16 bits, sums of 2^16 products stay below 2^48.
    """
    vectors = np.atleast_2d(u)
    total = np.zeros((y.shape[0], vectors.shape[0]), np.uint64)
    for part in _slices(y.shape[1], 1 << 16):
        u_low, u_high = _halves(vectors[:, part])
        y_low, y_high = _halves(y[:, part])
        low = (y_low @ u_low.T).astype(np.uint64)
        middle = (y_low @ u_high.T + y_high @ u_low.T).astype(np.uint64)
        high = (y_high @ u_high.T).astype(np.uint64)
        total += (low + (middle % P << 16) + (high % P << 32) % P) % P
    result = (total % P).astype(np.uint32)
    return result[:, 0] if u.ndim == 1 else result


def project(u: NDArray[np.uint32], q: NDArray[np.int8]) -> NDArray[np.uint32]:
    """u @ q mod p, exactly: u (C, M) canonical, q (M, K) int8, the result (C, K).

    Freivalds' Q^T u, once per matrix at start-up, so `q` may be large: memory stays bounded.
    """
    if u.ndim != 2 or q.ndim != 2 or u.shape[1] != q.shape[0]:
        raise ValueError(f"cannot multiply {u.shape} by {q.shape}")
    if native is not None:
        result: NDArray[np.uint32] = np.empty((u.shape[0], q.shape[1]), np.uint32)
        native.project(np.ascontiguousarray(u), np.ascontiguousarray(q), result)
        return result
    total = np.zeros((u.shape[0], q.shape[1]), np.int64)
    centred = centre(u).astype(np.float64)
    # 2^16 rows keep a float64 sum below 2^30 * 2^7 * 2^16 = 2^53; far fewer keep its operand small
    rows = max(1, min(1 << 16, (1 << 22) // max(1, q.shape[1])))
    for part in _slices(q.shape[0], rows):
        total += (centred[:, part] @ q[part].astype(np.float64)).astype(np.int64)
    return lift(total)


def _halves(x: NDArray[np.uint32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (x & np.uint32(0xFFFF)).astype(np.float64), (x >> np.uint32(16)).astype(np.float64)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))
