"""Put protected layers in the place of a model's own, and bind them to a runtime."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
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

_OF_MEMBERS = {"factor_a", "factor_b", "bias"}


def install(model: nn.Module, groups: list[Group], tensors: dict[str, torch.Tensor]) -> None:
    """Replace the layers that hold the matrices of `groups`, wherever `model` uses them.

    Args:
        tensors: as `group_layout` names them. Layers take their biases, which may be on the meta device until a
            checkpoint is loaded.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    protected = {m.name for group in groups for m in group}
    for name, module in list(model.named_modules()):
        found = members(name, module)
        if not found or found[0].name not in protected:
            continue
        dtype = model.get_parameter(found[0].weight).dtype
        parts = [ProtectedLinear(m.columns, m.rows, dtype, tensors.get(f"{m.name}.bias")) for m in found]
        if is_experts(module):
            protect_experts(module, parts)
        else:
            replaced[module] = ProtectedConv(module, parts) if isinstance(module, _ConvNd) else parts[0]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replaced:
                parent._modules[key] = replaced[child]


def bind(model: nn.Module, groups: list[Group], tensors: dict[str, torch.Tensor], digest: bytes) -> Runtime:
    """Bind the installed layers of `groups` to what they compute with; what they share is returned, `model.slip`.

    Args:
        tensors: as `group_layout` names them. They are copied, a group at a time, as they may be views of a file.
        digest: names the split (32 bytes).
    """
    runtime, bound = assemble([([m.name for m in group], isinstance(group, Sum)) for group in groups], tensors, digest)
    for group, by in zip(groups, bound, strict=True):
        for i, m in enumerate(group):
            module: Any = model.get_submodule(m.name)
            module.bind(by, i, m.name)
    shorten(model)
    model.slip = runtime  # type: ignore[assignment]
    return runtime


def assemble(
    groups: Sequence[tuple[Sequence[str], bool]], tensors: dict[str, torch.Tensor], digest: bytes
) -> tuple[Runtime, list[ProtectedGroup | SumGroup]]:
    """The arithmetic of `groups` (the names of the members, and whether they are a `Sum`), and the runtime that they
    share; the other arguments are those of `bind`. Raises KeyError with the name of a tensor that is not there, and
    BundleError for damaged ones."""
    own: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        member, _, key = name.rpartition(".")
        own[member][key] = tensor
    leaders = [own[names[0]] for names, _ in groups]
    shared = (_copies(tensors, tensors.keys() - _OF_MEMBERS) for tensors in leaders)
    runtime = Runtime([Operator.load(number, copies) for number, copies in enumerate(shared)], digest)
    bound: list[ProtectedGroup | SumGroup] = []
    for op, (names, is_sum) in zip(runtime.operators, groups, strict=True):
        weights = [
            MemberWeights(name, t["factor_a"], t["factor_b"], t.get("bias"))
            for name, t in ((name, _copies(own[name], own[name].keys() & _OF_MEMBERS)) for name in names)
        ]
        bound.append((SumGroup if is_sum else ProtectedGroup)(op, weights, runtime))
    return runtime, bound


def _copies(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of `names`, in memory of their own, the CPU's; floating ones as float32."""
    kinds = {name: torch.float32 if tensors[name].is_floating_point() else tensors[name].dtype for name in names}
    return {name: tensors[name].detach().to("cpu", kind, copy=True) for name, kind in kinds.items()}
