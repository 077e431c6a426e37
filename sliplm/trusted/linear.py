"""The module that takes a linear layer's place in the unmodified model, and any matrix's in others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sliplm.trusted.group import Group


class ProtectedLinear(nn.Module):
    """y = W x + b, with most of W on the edge.

    While a checkpoint loads, it holds the trusted tensors as buffers (`factor_a`, `factor_b`, ...). `bind`
    moves them into a `Group`, out of reach of casts that would spoil them.

    Args:
        dtype: of the original's weight.
        tensors: the trusted tensors, by the names that `group_layout` gives them.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, tensors: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._dtype = dtype
        self._loading = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._group: Group | None = None
        self._member = 0

    @property
    def weight(self) -> torch.Tensor:
        """What models ask a weight before they call it: a meta tensor (out, in) with a dtype and without values."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def __setattr__(self, name: str, value: Any) -> None:
        """Tools tie a model's weights anew (`model.tie_weights()`); a protected one stays what it is, on the edge."""
        if name != "weight":
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> ProtectedLinear:
        """Casts of the model change the dtype that `weight` shows, and nothing else."""
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def trusted_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to bind; empty once that is done."""
        return {name: self.get_buffer(name) for name in self._loading}

    def bind(self, group: Group, member: int) -> None:
        """Serve outputs of `member` of `group` from now on."""
        self._group, self._member = group, member
        for name in self._loading:
            delattr(self, name)
        self._loading = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) to (..., out_features). Raises LinkError, VerificationError, NumericsError."""
        if self._group is None:
            raise RuntimeError("this protected layer is not bound to an edge")
        return self._group.forward(self._member, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, protected"
