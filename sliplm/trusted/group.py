"""Linear maps that read the same input share one round trip: the first to be called makes it, others take a slice."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.errors import NumericsError
from sliplm.split.blinding import Rotation
from sliplm.trusted.runtime import Runtime


@dataclass(frozen=True, repr=False)
class MemberWeights:
    """The trusted part of one linear map: y = (edge's part) + A (B x) + b. A (N, k), B (k, K), b (N,), float32."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None


class _Pending(threading.local):
    """A copy of this thread's last input, and the outputs that members have not collected yet."""

    x: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] | None = None


class Group:
    """One group of protected linear maps, bound to a runtime.

    Args:
        number: the group's number on the edge.
        members: in the order in which their rows are stacked in Q.
        scales: (planes, sum N). row_norm: the largest row norm of Q. rotations: of inputs and outputs, or None.
    """

    def __init__(
        self,
        number: int,
        members: list[MemberWeights],
        scales: NDArray[np.float32],
        row_norm: float,
        rotations: tuple[Rotation | None, Rotation | None],
        runtime: Runtime,
    ) -> None:
        self.number = number
        self._members = members
        self._scales = scales
        self._row_norm = row_norm
        self._rotations = rotations
        self._runtime = runtime
        self._b = torch.cat([m.b for m in members])  # one product for all members
        self._pending = _Pending()

    def __repr__(self) -> str:
        return f"Group({self.number}, members={[m.name for m in self._members]})"

    def forward(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Output (..., N) of `member` for the input x (..., K), in x's dtype and on its device."""
        pending = self._pending
        outputs = pending.outputs
        if outputs is None or member not in outputs or not _equal(pending.x, x):
            outputs = self._run(x)
            if len(self._members) > 1:
                pending.x, pending.outputs = x.detach().clone(), outputs
        y = outputs.pop(member)
        if not outputs:
            pending.x = pending.outputs = None
        return y

    def _run(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        flat = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32).contiguous()
        low = flat @ self._b.T
        try:
            edge = self._runtime.product(self.number, flat.numpy(), self._row_norm, self._scales, self._rotations)
        except NumericsError as error:
            raise NumericsError(f"the input of {self._members[0].name} cannot be protected: {error}.") from None
        stacked = torch.from_numpy(edge)
        outputs: dict[int, torch.Tensor] = {}
        row = column = 0
        for i, m in enumerate(self._members):
            rows, rank = m.a.shape
            y = torch.addmm(stacked[:, row : row + rows], low[:, column : column + rank], m.a.T)
            if m.bias is not None:
                y += m.bias
            outputs[i] = y.reshape(*x.shape[:-1], rows).to(x.device, x.dtype)
            row, column = row + rows, column + rank
        return outputs


def _equal(kept: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Compared by value: an address can be reused and a tensor changed in place, and neither always shows."""
    return kept is not None and kept.dtype == x.dtype and kept.device == x.device and torch.equal(kept, x)
