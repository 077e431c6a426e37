"""Which linear maps are protected, and which of them read the same input (q, k, v; gate, up): one group, one round trip."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sliplm.errors import UnsupportedModelError

MAX_COLUMNS = (1 << 16) - 1  # int32 accumulation in the edge's kernel is exact up to here (DESIGN §4)


@dataclass(frozen=True)
class Member:
    """One protected linear map: y = W x + b with W of shape (rows, columns).

    `transposed` says that the stored weight is W^T, as in GPT-2's Conv1D.
    """

    name: str
    rows: int
    columns: int
    bias: bool
    transposed: bool


Group = tuple[Member, ...]


def is_protectable(module: nn.Module) -> bool:
    """A plain linear map, whose forward is the one we replace."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or type(module) is Conv1D


def find_groups(model: nn.Module, inputs: dict[str, Any] | None = None) -> list[Group]:
    """Trace `model` once (under fake tensors it costs no arithmetic) and group its linear maps by the tensor they read.

    Args:
        inputs: keyword arguments of the call; by default made from the model's configuration.

    Returns:
        Groups in order of execution. Maps that the trace does not reach come last, each alone.

    Raises:
        UnsupportedModelError: naming the modules that cannot be protected.
    """
    linear = {name: module for name, module in model.named_modules() if is_protectable(module)}
    _refuse_others(model, set(linear))
    calls: dict[Hashable, list[str]] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address would be reused, and two inputs taken for one

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            alive.append(x)
            place = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            calls.setdefault(place, []).append(name)

        return before

    hooks = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in linear.items()]
    try:
        with torch.no_grad():
            model(**(inputs if inputs is not None else _example(model)))
    finally:
        for handle in hooks:
            handle.remove()
    together: dict[str, set[frozenset[str]]] = {}
    for names in calls.values():
        for name in names:
            together.setdefault(name, set()).add(frozenset(names))
    groups: list[Group] = []
    done: set[str] = set()
    for name in [*(n for names in calls.values() for n in names), *linear]:
        if name in done:
            continue
        # A map called with different company at different times is a group of its own.
        sets = together.get(name, {frozenset([name])})
        steady = len(sets) == 1 and all(together[other] == sets for other in next(iter(sets)) if other in together)
        names = [n for n in linear if n in next(iter(sets))] if steady else [name]
        groups.append(tuple(as_member(n, linear[n]) for n in names))
        done.update(names)
    return groups


def as_member(name: str, module: nn.Module) -> Member:
    """Describe a protectable module. Raises UnsupportedModelError if it is too wide."""
    weight, transposed = module.weight, isinstance(module, Conv1D)
    assert isinstance(weight, torch.Tensor)
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    if columns > MAX_COLUMNS:
        raise UnsupportedModelError(f"{name} reads {columns} features; at most {MAX_COLUMNS} are supported.")
    return Member(name, rows, columns, module.bias is not None, transposed)


def _refuse_others(model: nn.Module, linear: set[str]) -> None:
    """Every matrix must be protected or stay on the trusted side knowingly: an embedding table, or a norm."""
    strange = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name not in linear
        and not isinstance(module, nn.Embedding)
        and any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    ]
    if strange:
        shown = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        raise UnsupportedModelError(f"layers of an unsupported type hold weights: {shown}.")
    if not linear:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layer to protect.")


def _example(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
