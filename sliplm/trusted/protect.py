"""Protect a module in memory: trusted side and edge in one process, as in a notebook or a test."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import torch
from torch import nn

from sliplm import kernels
from sliplm.errors import UnsupportedModelError
from sliplm.pads.sources import SelfSource
from sliplm.split.groups import find_groups, protected_tensors
from sliplm.split.layers import members
from sliplm.split.matrices import make_plan, split_group
from sliplm.split.plan import Options
from sliplm.trusted.install import bind, install
from sliplm.trusted.runtime import Runtime

Module = TypeVar("Module", bound=nn.Module)


def protect(
    module: Module,
    inputs: Any = None,
    *,
    rank: int = 16,
    planes: int = 2,
    camouflage: bool = True,
    blinding: bool = True,
) -> Module:
    """Replace the layers of `module` by protected ones, with an edge in this process.

    Works on any `torch.nn.Module`, in place, and puts it in evaluation mode. The weights of protected layers are gone
    from it afterwards. The result carries its runtime as `module.slip`: `module.slip.using(link)` sends the exchanges
    elsewhere.

    Args:
        inputs: for one trial run, which shows what layers read the same tensor and can share a round trip: a
            tensor, a tuple of positional arguments, or a dictionary of keyword arguments. Transformers models
            need none. Without, or if the run fails, every matrix has round trips of its own.
        rank, planes, camouflage, blinding: see `sliplm.split.plan.Options`.

    Returns:
        `module` itself; a module that is one single layer comes back wrapped in `nn.Sequential`.

    Raises:
        UnsupportedModelError: naming the modules that cannot be protected; `module` is then as it was.
    """
    options = Options(rank, planes, camouflage, blinding)
    if isinstance(getattr(module, "slip", None), Runtime):
        raise UnsupportedModelError("this module is protected already.")
    model: Any = nn.Sequential(module) if members("", module) else module
    model.eval()
    groups = find_groups(model, inputs, rank)
    source = _ModuleSource(model)
    stored = {name: name for name in protected_tensors(groups)}
    tensors: dict[str, torch.Tensor] = {}
    matrices, digest = [], hashlib.sha256()
    for number, (group, plan) in enumerate(zip(groups, make_plan(groups, options), strict=True)):
        for name, tensor in split_group(source, number, group, plan, stored, options):
            if name == "q":
                q = tensor.numpy()
                digest.update(hashlib.sha256(q.data).digest())
                matrices.append(kernels.prepare(q))
            else:
                tensors[name] = tensor
    install(model, groups, tensors)
    bind(model, groups, tensors, digest.digest()).attach(SelfSource(matrices))
    protected: Module = model
    return protected


class _ModuleSource:
    """Weights of a module, as `split_group` reads them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._model.get_parameter(name).shape)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        whole = self._model.get_parameter(name).detach()
        size = whole.shape[0] // parts
        piece = whole[part * size : (part + 1) * size].cpu()
        if not bool(torch.isfinite(piece).all()):
            raise UnsupportedModelError(f"the weight {name} holds values that are not finite numbers.")
        return piece
