"""A convolution as products with the patches of its input, which the trusted side cuts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sliplm.trusted.linear import ProtectedLinear


class ProtectedConv(nn.Module):
    """Takes the place of a convolution of one, two or three dimensions.

    Every output position is one row to the edge, of (channels per group) * (kernel size) numbers; every channel group
    is a matrix of its own. The patches take (kernel size) / (stride) times the memory of the input, per dimension.

    Args:
        parts: one per channel group.
    """

    def __init__(self, conv: _ConvNd, parts: list[ProtectedLinear]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self._padding = tuple(conv._reversed_padding_repeated_twice)  # "same" is resolved here
        self._mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        for number, part in enumerate(parts):
            self.add_module(str(number), part)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original's weight, on the meta device."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self.get_submodule("0").weight.new_empty(shape)  # type: ignore[operator, union-attr]

    @property
    def bias(self) -> torch.Tensor | None:
        parts: list[Any] = [part.bias for part in self.children()]
        return None if parts[0] is None else torch.cat(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, in_channels, *space), or without the batch, to (batch, out_channels, *space)."""
        dimensions = len(self.kernel_size)
        if x.dim() == dimensions + 1:
            return self.forward(x[None])[0]
        rows = self._patches(F.pad(x, self._padding, self._mode) if any(self._padding) else x)
        out = torch.cat([part(rows[g]) for g, part in enumerate(self.children())], dim=-1)
        return out.movedim(-1, 1).contiguous()

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, batch, *space, channels per group * kernel size)."""
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        dimensions = len(self.kernel_size)
        x = x.unflatten(1, (self.groups, -1))  # batch, groups, channels, *space, *kernel
        space = range(3, 3 + dimensions)
        kernel = range(3 + dimensions, 3 + 2 * dimensions)
        return x.permute(1, 0, *space, 2, *kernel).flatten(2 + dimensions)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, protected"
