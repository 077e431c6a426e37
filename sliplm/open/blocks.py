"""The decoder blocks of a Transformers model: where they are, and what takes the place of one that is elsewhere.

A model keeps the number of its blocks, wherever they are computed: on both sides, numbers of layers, kinds of masks and
the layers of the cache are then those of the original.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sliplm.errors import UnsupportedModelError


def block_list(model: Any) -> str:
    """The name of the list of `model`'s decoder blocks, such as "model.layers". Raises UnsupportedModelError."""
    if (found := _largest(model)) is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder blocks.")
    return found


def _largest(model: Any) -> str | None:
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (_continues(model, name), sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return max(found)[2] if found else None


def block_of(name: str, place: str) -> int | None:
    """In which of the blocks of the list `place` a module or tensor is by its `name`; None if in none."""
    if not name.startswith(f"{place}."):
        return None
    return int(name.removeprefix(f"{place}.").partition(".")[0])


def find_blocks(model: Any) -> str:
    """The same, of blocks that can be computed apart from the rest. Raises UnsupportedModelError."""
    place = _largest(model)
    if place is None or model.config.is_encoder_decoder or not _continues(model, place):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks: only the plan all is for it."
        )
    kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise UnsupportedModelError(
            f"the blocks of {type(model).__name__} remember more than keys and values: only the plan all is for it."
        )
    return place


def _continues(model: Any, name: str) -> bool:
    """Whether the module that has the list `name` takes hidden states and a cache."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return {"inputs_embeds", "past_key_values"} <= set(inspect.signature(owner.forward).parameters)


class Elsewhere(nn.Module):
    """In the place of the block `index`, which is not here: hidden states go through as they are.

    The cache gets a number for every position in that layer, so that it knows its length in each: Transformers asks the
    first one, or the first of a kind.
    """

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        for name, value in vars(block).items():  # what models ask of their blocks, as `attention_type`
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
                setattr(self, name, value)
        self.index = index

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hidden states (B, T, H)."""
        if (cache := find_cache(args, kwargs)) is not None:
            self.note(cache, hidden_states)
        return hidden_states

    def note(self, cache: Cache, like: torch.Tensor) -> None:
        """T more positions of each of B sequences, which are numbered."""
        rows = torch.arange(len(like), dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, like.shape[1], 1)
        cache.update(rows, rows, self.index)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a block, whatever it is called there."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
