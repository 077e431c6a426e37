"""What an exchange must know of a group of matrices, and how a trusted bundle stores it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.errors import BundleError
from sliplm.exchange.check import CHECKS
from sliplm.exchange.masking import amplitude
from sliplm.field import is_canonical
from sliplm.split.blinding import SIDES, Blinding, stored

ROWS, BYTES = 128, 32 << 20
"""The most that one exchange carries: rows, and bytes each way. Longer inputs take several, so neither frames nor
buffers grow with a prompt, and trusted side and edge work on it at the same time. Fewer rows would cost the edge more
a row: its product takes them by some fifty."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, repr=False, eq=False)
class Operator:
    """A group's constants: the edge's Q (M, K) stands for W_edge (N, K) = sum_j diag(s_j) Q_j, blinded on both sides.

    Attributes:
        number: the group's, on the edge. shape: (M, K), with M = planes * N.
        row_norm: the largest Euclidean norm of a row of Q, rounded up.
        scales: (planes, N), float32.
        inner, outer: the secret bases of inputs and of outputs; None without blinding.
        u, uq: secrets of the check, (CHECKS, M) and u Q (CHECKS, K), field elements.
    """

    number: int
    shape: tuple[int, int]
    row_norm: float
    scales: NDArray[np.float32]
    inner: Blinding | None
    outer: Blinding | None
    u: NDArray[np.uint32]
    uq: NDArray[np.uint32]

    def __repr__(self) -> str:
        return f"Operator({self.number}, shape={self.shape})"

    def __reduce__(self) -> str:
        raise TypeError("an operator holds secrets and cannot be copied")

    @cached_property
    def length(self) -> float:
        """Of encoded inputs, see `masking.amplitude`."""
        return amplitude(self.row_norm, self.shape[1])

    @cached_property
    def rows(self) -> int:
        """How many rows one exchange may carry."""
        return max(1, min(ROWS, BYTES // (4 * max(self.shape))))

    @cached_property
    def maps(self) -> tuple[Any, Any]:
        """The bases of inputs and of outputs as the native core takes them."""
        return tuple(None if b is None else (b.perm, b.turns, b.diagonal) for b in (self.inner, self.outer))  # type: ignore[return-value]

    @staticmethod
    def layout(planes: int, rows: int, columns: int, blinding: bool) -> Layout:
        """What a bundle stores of the operator of a matrix (rows, columns): name -> dtype, shape, in file order. Field
        elements are int32, since all are below 2^31."""
        layout: Layout = {"scales": (torch.float32, (planes, rows)), "row_norm": (torch.float32, ())}
        if blinding:
            for side, length in zip(SIDES, (columns, rows), strict=True):
                layout |= {f"{side}_{kind}": entry for kind, entry in Blinding.layout(length).items()}
        return layout | {
            "check_u": (torch.int32, (CHECKS, planes * rows)),
            "check_uq": (torch.int32, (CHECKS, columns)),
        }

    @classmethod
    def load(cls, number: int, tensors: dict[str, torch.Tensor]) -> Operator:
        """From tensors by the names of `layout`, which are not copied. Raises BundleError if they cannot be."""
        inner, outer = stored(tensors.__getitem__) if "in_perm" in tensors else (None, None)
        u, uq = (tensors[name].numpy().view(np.uint32) for name in ("check_u", "check_uq"))
        # With a row of zeros, of which a loader that fails may leave behind, a check would accept anything.
        if not (is_canonical(u) and is_canonical(uq) and u.any(axis=1).all()):
            raise BundleError("the secrets of the check are damaged: nothing would be verified with them.")
        shape = u.shape[1], uq.shape[1]
        return cls(number, shape, float(tensors["row_norm"]), tensors["scales"].numpy(), inner, outer, u, uq)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of `layout`, in its order."""
        found = {"scales": torch.from_numpy(self.scales), "row_norm": torch.tensor(self.row_norm, dtype=torch.float32)}
        for side, blinding in zip(SIDES, (self.inner, self.outer), strict=True):
            if blinding is not None:
                found |= {f"{side}_{kind}": tensor for kind, tensor in blinding.tensors().items()}
        for name, values in (("check_u", self.u), ("check_uq", self.uq)):
            found[name] = torch.from_numpy(values.view(np.int32))
        return found
