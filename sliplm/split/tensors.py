"""Which tensors the protected model keeps as they are, and under what names the checkpoint stores all of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from sliplm.errors import UnsupportedModelError
from sliplm.split.groups import Group, protected_tensors
from sliplm.split.source import Source

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def resolve(
    skeleton: transformers.PreTrainedModel, groups: list[Group], tied: dict[str, str], source: Source
) -> tuple[Layout, dict[str, str]]:
    """What stays as it is, and what the source calls each tensor that is needed."""
    plain = _plain_tensors(skeleton, groups, tied)
    return plain, _stored_names([*plain, *protected_tensors(groups)], tied, source.names())


def differ(source: Source, target: str, origin: str) -> bool:
    """Whether both tensors of a tied pair are stored and are not the same: Transformers then leaves them apart."""
    if not {target, origin} <= source.names():
        return False
    return source.shape(target) != source.shape(origin) or not torch.equal(
        source.read(target).float(), source.read(origin).float()
    )


def token_table(model: Any) -> tuple[str | None, int]:
    """The name of the table in which `model` looks up its tokens, and its rows; None and 0 if it has no such table."""
    tables = {module: name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    return (tables[table], table.num_embeddings) if table in tables else (None, 0)


def _plain_tensors(skeleton: transformers.PreTrainedModel, groups: list[Group], tied: dict[str, str]) -> Layout:
    """Tensors that stay as they are: name -> dtype, shape. Of tied ones, those that the others are made from."""
    protected = protected_tensors(groups)
    owners = {name.rpartition(".")[0] for name in protected}
    layers = {skeleton.get_submodule(name) for name in owners}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        if module in layers and name not in owners:
            raise UnsupportedModelError(f"{name} ({type(module).__name__}) is a layer that has another name, too.")
    return {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in skeleton.state_dict().items()
        if name not in protected and (name not in tied or tied[name] in protected)
    }


def _stored_names(names: list[str], tied: dict[str, str], stored: set[str]) -> dict[str, str]:
    """Where the checkpoint has each tensor: a tied one may be there under its own name or under the other."""
    return {name: tied[name] if tied.get(name) in stored else name for name in names}
