"""Put protected layers in the place of a model's own, and bind them to a runtime."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sliplm.exchange.operator import Operator
from sliplm.split.groups import Group, Sum
from sliplm.split.layers import is_experts, members
from sliplm.trusted.conv import ProtectedConv
from sliplm.trusted.decoder import shorten
from sliplm.trusted.experts import protect_experts
from sliplm.trusted.group import MemberWeights, ProtectedGroup
from sliplm.trusted.linear import ProtectedLinear
from sliplm.trusted.runtime import Runtime
from sliplm.trusted.sums import SumGroup


def install(model: nn.Module, groups: list[Group], tensors: dict[str, torch.Tensor]) -> None:
    """Replace the layers that hold the matrices of `groups`, wherever `model` uses them.

    Args:
        tensors: as `group_layout` names them; they may be on the meta device until a checkpoint is loaded.
    """
    own: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        member, _, key = name.rpartition(".")
        own[member][key] = tensor
    replaced: dict[nn.Module, nn.Module] = {}
    protected = {m.name for group in groups for m in group}
    for name, module in list(model.named_modules()):
        found = members(name, module)
        if not found or found[0].name not in protected:
            continue
        dtype = model.get_parameter(found[0].weight).dtype
        parts = [ProtectedLinear(m.columns, m.rows, dtype, own[m.name]) for m in found]
        if is_experts(module):
            protect_experts(module, parts)
        else:
            replaced[module] = ProtectedConv(module, parts) if isinstance(module, _ConvNd) else parts[0]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replaced:
                parent._modules[key] = replaced[child]


def bind(model: nn.Module, groups: list[Group], digest: bytes) -> Runtime:
    """Move the loaded tensors out of the modules and into operators and groups; what they share is returned, and is
    `model.slip`. `digest` names the split (32 bytes)."""
    loaded = [[_copies(model.get_submodule(m.name).trusted_tensors()) for m in group] for group in groups]  # type: ignore[operator]
    runtime = Runtime([Operator.load(number, tensors[0]) for number, tensors in enumerate(loaded)], digest)
    for op, group, tensors in zip(runtime.operators, groups, loaded, strict=True):
        weights = [
            MemberWeights(m.name, t["factor_a"], t["factor_b"], t.get("bias"))
            for m, t in zip(group, tensors, strict=True)
        ]
        bound = (SumGroup if isinstance(group, Sum) else ProtectedGroup)(op, weights, runtime)
        for i, m in enumerate(group):
            module: Any = model.get_submodule(m.name)
            module.bind(bound, i, m.name)
    shorten(model)
    model.slip = runtime  # type: ignore[assignment]
    return runtime


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In memory of their own, the CPU's: the loader's are views of a mapped file, or already on a GPU."""
    return {name: (t.float() if t.is_floating_point() else t).detach().cpu().clone() for name, t in tensors.items()}
