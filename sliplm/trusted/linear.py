"""The module that takes a linear layer's place in the unmodified model, and any matrix's in others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from sliplm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sliplm.trusted.group import ProtectedGroup


class Absent(torch.Tensor):
    """A weight that is elsewhere: shape and dtype, on the meta device, and the name of its layer.

    Torch lets some products of a real tensor and a meta tensor pass, and gives back memory as it found it. So whatever
    takes this one together with a real tensor, or what was made of this one, is refused.
    """

    layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        layer = next(t.layer for t in given if isinstance(t, cls))
        with torch._C.DisableTorchFunctionSubclass():
            if not all(t.is_meta for t in given):
                raise UnsupportedModelError(
                    f"the model's code computes with the weight of {layer} itself, which is on the edge: this layer "
                    "cannot be protected."
                )
            made = func(*args, **kwargs or {})
            return tree_map(lambda t: _mark(t, layer) if isinstance(t, torch.Tensor) and t.is_meta else t, made)


def _mark(tensor: torch.Tensor, layer: str) -> Absent:
    marked = tensor.as_subclass(Absent)
    marked.layer = layer
    return marked


class ProtectedLinear(nn.Module):
    """y = W x + b, with most of W on the edge.

    What it computes with is in a `ProtectedGroup`, out of reach of casts that would spoil it. `bias` is for models
    that read it.

    Args:
        dtype: of the original's weight.
    """

    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._dtype = dtype
        self.register_buffer("bias", bias)
        self._group: ProtectedGroup | None = None
        self._member = 0
        self._name = "a layer"

    @property
    def weight(self) -> torch.Tensor:
        """What models ask a weight before they call it: a meta tensor (out, in) with a dtype and without values."""
        shape = self.out_features, self.in_features
        return _mark(torch.empty(shape, dtype=self._dtype, device="meta"), self._name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Tools tie a model's weights anew (`model.tie_weights()`); a protected one stays what it is, on the edge."""
        if name == "bias" and self._group is not None:
            raise AttributeError("the bias of a protected layer cannot be replaced: it would go on with the old one")
        if name != "weight":
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> ProtectedLinear:
        """Casts of the model change the dtype that `weight` shows, and nothing else."""
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def bind(self, group: ProtectedGroup, member: int, name: str) -> None:
        """Serve outputs of `member` of `group` from now on, the matrix `name` of the model."""
        bias = None if self.bias is None else self.bias.detach().clone()  # the loader's is a view of a mapped file
        del self.bias
        self.register_buffer("bias", bias, persistent=False)
        self._group, self._member, self._name = group, member, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) to (..., out_features). Raises LinkError, VerificationError, NumericsError."""
        if self._group is None:
            raise RuntimeError("this protected layer is not bound to an edge")
        return self._group.forward(self._member, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, protected"
