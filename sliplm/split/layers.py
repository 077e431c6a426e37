"""What can be protected: layers that multiply rows by one or more matrices W (N, K), wherever they keep them.

A linear layer is one matrix; a convolution is one per channel group, its rows being patches of the input; a block
of experts in three-dimensional parameters, as Transformers keeps them, is two per expert.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from sliplm.errors import UnsupportedModelError

MAX_COLUMNS = (1 << 16) - 1  # int32 accumulation in the edge's kernel is exact up to here
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Member:
    """One protected matrix: y = W x + b with W of shape (rows, columns).

    Attributes:
        name: the path of the module that will stand for it in the protected model.
        weight, bias: names of the tensors that hold it in the original; no bias is None.
        shape: of the tensor `weight`.
        part, parts: that tensor's first axis, and the bias's, is `parts` equal pieces; W is number `part`.
        transposed: the piece is W^T, as in GPT-2's Conv1D.
    """

    name: str
    rows: int
    columns: int
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    transposed: bool = False

    def matrix(self, piece: torch.Tensor) -> torch.Tensor:
        """W (rows, columns), a view of its piece of the tensor `weight`."""
        if self.transposed:
            return piece.reshape(self.columns, self.rows).T
        return piece.reshape(self.rows, self.columns)


def members(name: str, module: nn.Module) -> tuple[Member, ...]:
    """The matrices of the layer `module`, which the model calls `name`; none if it is no layer that we can protect.

    Raises:
        UnsupportedModelError: it reads too many features.
    """
    if is_linear(module):
        found: tuple[Member, ...] = (_linear(name, module),)
    elif is_convolution(module):
        found = _convolution(name, module)
    elif is_experts(module):
        found = _experts(name, module)
    else:
        return ()
    if (columns := max(m.columns for m in found)) > MAX_COLUMNS:
        raise UnsupportedModelError(f"{name} reads {columns} features; at most {MAX_COLUMNS} are supported.")
    return found


def is_linear(module: nn.Module) -> bool:
    """A plain linear map, whose forward is what we replace it by, and whose weight is a parameter and not computed."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention never calls it
        return False
    if "weight" not in module._parameters:
        return False
    if type(module) is Conv1D:
        return True
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or _acts_linear(module))


def _acts_linear(module: nn.Linear) -> bool:
    """Whether a forward of the module's own computes what `nn.Linear` does, tried on a small copy."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        probe = copy.copy(module)
        probe.in_features, probe.out_features = 5, 3
        bias = None if module.bias is None else nn.Parameter(torch.randn(3))
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(torch.randn(3, 5)), "bias": bias}
        x = torch.randn(2, 4, 5)
        try:
            return bool(torch.allclose(type(module).forward(probe, x), nn.Linear.forward(probe, x), atol=1e-5))
        except Exception:  # whatever it needs, it is not plain
            return False


def is_convolution(module: nn.Module) -> bool:
    """A plain convolution of one, two or three dimensions."""
    if not isinstance(module, _CONVOLUTIONS) or "weight" not in module._parameters:
        return False
    own = type(module)
    return any(own.forward is c.forward and own._conv_forward is c._conv_forward for c in _CONVOLUTIONS)


def is_experts(module: nn.Module) -> bool:
    """A block that follows Transformers' interface for experts (`use_experts_implementation`): it says itself how its
    parameters are laid out, and its arithmetic is the interface's."""
    if not hasattr(module, "has_gate") or not callable(getattr(module, "_apply_gate", None)):
        return False
    names = expert_parameters(module)
    return all(name in module._parameters and module._parameters[name].dim() == 3 for name in names)  # type: ignore[union-attr]


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """The parameters that hold the experts' first and second matrices."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def join(*path: str) -> str:
    return ".".join(p for p in path if p)


def _linear(name: str, module: nn.Module) -> Member:
    weight, transposed = module.weight, isinstance(module, Conv1D)
    assert isinstance(weight, torch.Tensor)
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    bias = join(name, "bias") if module.bias is not None else None
    return Member(name, rows, columns, join(name, "weight"), bias, tuple(weight.shape), transposed=transposed)


def _convolution(name: str, module: nn.Module) -> tuple[Member, ...]:
    assert isinstance(module, _ConvNd)
    shape, groups = tuple(module.weight.shape), module.groups
    rows, columns = shape[0] // groups, module.weight[0].numel()
    bias = join(name, "bias") if module.bias is not None else None
    weight = join(name, "weight")
    return tuple(Member(join(name, str(g)), rows, columns, weight, bias, shape, g, groups) for g in range(groups))


def _experts(name: str, module: nn.Module) -> tuple[Member, ...]:
    found = []
    for key in expert_parameters(module):
        weight = getattr(module, key)
        count, rows, columns = weight.shape
        if module.is_transposed:
            rows, columns = columns, rows
        names = join(name, key), join(name, f"{key}_bias") if module.has_bias else None
        place = tuple(weight.shape), count, bool(module.is_transposed)
        found += [Member(join(name, key, str(e)), rows, columns, *names, place[0], e, *place[1:]) for e in range(count)]
    return tuple(found)
