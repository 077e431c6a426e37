"""The module that takes a linear layer's place in the unmodified model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from sliplm.trusted.group import Group


class ProtectedLinear(nn.Module):
    """y = W x + b, with most of W on the edge.

    While a checkpoint loads, it holds the trusted tensors as buffers (`factor_a`, `factor_b`, ...). `bind` then
    moves them into a `Group`, out of reach of casts that would spoil them.
    """

    def __init__(self, in_features: int, out_features: int, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._group: Group | None = None
        self._member = 0

    def bind(self, group: Group, member: int) -> None:
        """Serve outputs of `member` of `group` from now on."""
        self._group, self._member = group, member
        self._buffers.clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) to (..., out_features). Raises LinkError, VerificationError, NumericsError."""
        if self._group is None:
            raise RuntimeError("this protected layer is not bound to an edge")
        return self._group.forward(self._member, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, protected"
