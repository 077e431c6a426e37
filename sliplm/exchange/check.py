"""Freivalds' check: whether an edge's answer is Q times the question, without computing that product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sliplm import field
from sliplm._core import native
from sliplm.prg import uniform

if TYPE_CHECKING:
    from sliplm.exchange.operator import Operator

CHECKS = 2  # independent checks per row and exchange; each misses an error with probability 1/p


def secrets(q: NDArray[np.int8]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Fresh secrets for the matrix `q` (M, K): u (CHECKS, M), uniform, and u q mod p (CHECKS, K).

    They are made once, at the split, where Q still is. That an edge is answered by them for as long as its bundle lives
    costs nothing: what it learns is whether an answer passed, which it knew beforehand but with probability p^-CHECKS.
    """
    u = uniform(CHECKS, len(q))
    return u, field.project(u, q)


def check(op: Operator, masked: NDArray[np.uint32], answer: NDArray[np.uint32]) -> bool:
    """Whether answer (T, M) is Q masked (T, K): <u_i, answer_t> = <u_i Q, masked_t> mod p for all i and t, and all of
    it is canonical.

    A wrong answer passes with probability p^-CHECKS over u (Freivalds 1977; docs/security.md). Everything is evaluated,
    whatever fails first.
    """
    if answer.dtype != np.uint32 or answer.shape != (len(masked), op.shape[0]):
        return False
    if native is not None:
        return bool(native.verify(op.u, op.uq, masked, np.ascontiguousarray(answer)))
    canonical = field.is_canonical(answer)
    return bool((field.dot(op.u, answer) == field.dot(op.uq, masked)).all()) and canonical
