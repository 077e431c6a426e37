"""A table of embeddings that stays in the bundle's file, which is mapped: memory holds the rows that texts need."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from sliplm.split.tensors import token_table


class MappedEmbedding(nn.Module):
    """Takes the place of an `nn.Embedding`: rows are converted when they are looked up, so they are what a converted
    table would give, and half or all of its memory is saved.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        weight: no rows, (0, embedding_dim): it goes with the model to other types and devices, in the table's place.
    """

    weight: torch.Tensor

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.register_buffer("weight", like.weight.detach().new_empty(0, like.embedding_dim), persistent=False)
        self._table = torch.empty(0)

    def bind(self, table: torch.Tensor) -> None:
        """Serve rows of `table` (num_embeddings, embedding_dim), of any floating type, on the CPU, not copied."""
        self._table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (..., embedding_dim) of the table for ids (...)."""
        return functional.embedding(ids.cpu(), self._table).to(self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, mapped"


def map_table(model: nn.Module, tied: dict[str, str]) -> tuple[str, MappedEmbedding] | None:
    """Put a `MappedEmbedding` in the place of the table in which `model` looks up its tokens; it, and the name of its
    tensor. None, and nothing done, where that table is of a class of its own, or one of `tied` tensors (target ->
    origin)."""
    name, _ = token_table(model)
    if name is None or f"{name}.weight" in {*tied, *tied.values()}:
        return None
    table = model.get_submodule(name)
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return None
    mapped = MappedEmbedding(table)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is table:
                parent._modules[key] = mapped
    return f"{name}.weight", mapped
