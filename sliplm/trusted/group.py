"""Linear maps that read the same input share one round trip: the first to be called makes it, others take a slice."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sliplm._core import native
from sliplm.errors import NumericsError
from sliplm.exchange.operator import Operator
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


class ProtectedGroup:
    """One group of protected linear maps, bound to a runtime.

    Args:
        op: the edge's part, of all members together.
        members: in the order in which their rows are stacked in Q.
    """

    def __init__(self, op: Operator, members: list[MemberWeights], runtime: Runtime) -> None:
        self._op = op
        self._runtime = runtime
        self._rows = [len(m.a) for m in members]
        # Transposed, as both the products of torch and those of the native core want them; B of all members as one.
        b = torch.cat([m.b for m in members])
        bt = functional.pad(b, (0, 0, 0, -len(b) % 16)).T.contiguous()  # the native product wants whole vectors
        at, bias = [m.a.T.contiguous() for m in members], [m.bias for m in members]
        self._factors = None if native else (bt, at, bias)
        self._low_rank: Any = native_low_rank(bt, at, bias) if native else None
        self._names = [m.name for m in members]
        self._pending = _Pending()

    def __repr__(self) -> str:
        return f"ProtectedGroup({self._op.number}, members={self._names})"

    def __len__(self) -> int:
        return len(self._names)

    def forward(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Output (..., N) of `member` for the input x (..., K), in x's dtype and on its device."""
        pending = self._pending
        outputs = pending.outputs
        if outputs is None or member not in outputs or not _equal(pending.x, x):
            outputs = self._run(x)
            if len(self._names) > 1:
                pending.x, pending.outputs = x.detach().clone(), outputs
        y = outputs.pop(member)
        if not outputs:
            pending.x = pending.outputs = None
        return y

    def _run(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        rows = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32).contiguous().numpy()
        parts = torch.from_numpy(self.stacked(rows)).split(self._rows, dim=1)
        return {i: y.reshape(*x.shape[:-1], y.shape[1]).to(x.device, x.dtype) for i, y in enumerate(parts)}

    def stacked(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The outputs (T, sum N) of all members side by side for the input x (T, K)."""
        try:
            return self._runtime.product(self._op, x, self._own)
        except NumericsError as error:
            raise NumericsError(f"the input of {self._names[0]} cannot be protected: {error}.") from None

    def _own(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """A (B x) + b of all members side by side, (T, sum N)."""
        out = np.empty((len(x), sum(self._rows)), np.float32)
        if self._factors is None:
            self._low_rank.apply(x, out)
            return out
        bt, at, biases = self._factors
        low, whole = torch.from_numpy(x) @ bt, torch.from_numpy(out)
        column = row = 0
        for a, bias in zip(at, biases, strict=True):
            rank, rows = a.shape
            part = whole[:, row : row + rows]
            torch.mm(low[:, column : column + rank], a, out=part)
            if bias is not None:
                part += bias
            column, row = column + rank, row + rows
        return out


def native_low_rank(bt: torch.Tensor, at: list[torch.Tensor], bias: list[torch.Tensor | None]) -> Any:
    """The native A (B x) + b of members side by side, with copies of the factors: bt (K, W) is their B, transposed,
    with zeros up to a multiple of 16 columns; at (k, N) each one's A, transposed."""
    assert native is not None
    biases = [None if b is None else b.numpy() for b in bias]
    if all(torch.equal(t.bfloat16().float(), t) for t in (bt, *at)):
        # A split rounds the factors, and the edge's part takes up the difference: half the memory to read.
        small = [t.bfloat16().view(torch.uint16).numpy() for t in (bt, *at)]
        return native.LowRank16(small[0], small[1:], biases)
    return native.LowRank32(bt.numpy(), [a.numpy() for a in at], biases)


def _equal(kept: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Compared by value: an address can be reused and a tensor changed in place, and neither always shows."""
    return kept is not None and kept.dtype == x.dtype and kept.device == x.device and torch.equal(kept, x)
