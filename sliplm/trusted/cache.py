"""A cache of keys and values with room to grow: a decoding step writes one column, and does not copy all before it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Transformers' `DynamicLayer`, whose `keys` and `values` (B, G, S, D) are the first columns of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        """With what `layer` holds."""
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._rooms = _Room(), _Room()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, G, T, D); all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys, values = self._rooms
        self.keys, self.values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        return self.keys, self.values

    def forget(self, count: int) -> None:
        """Remove the last `count` tokens. Unlike `crop`, this uses their room again, so nobody may hold on to what
        `keys` and `values` were before."""
        if count > 0 and self.keys is not None and self.values is not None:
            keys, values = self._rooms
            self.keys, self.values = keys.cut(self.keys, count), values.cut(self.values, count)


class _Room:
    """What one tensor of a cache grows in."""

    def __init__(self) -> None:
        self._all: torch.Tensor = torch.empty(0, 0, 0, 0)
        self._shown: torch.Tensor = self._all

    def append(self, shown: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`shown` (B, G, S, D), or empty, and after it `new` (B, G, T, D)."""
        count = shown.shape[-2] if shown.numel() else 0
        end = count + new.shape[2]
        # If it is not what we gave out, somebody has cut or reordered it, and may hold on to what was there before.
        # Torch lets nobody write to tensors of the inference mode outside of it.
        if (
            shown is not self._shown
            or end > self._all.shape[2]
            or (not torch.is_inference_mode_enabled() and self._all.is_inference())
        ):
            room = new.new_empty(*new.shape[:2], end + max(64, end // 4), new.shape[3])
            if count:
                room.narrow(2, 0, count).copy_(shown)
            self._all = room
        self._all.narrow(2, count, new.shape[2]).copy_(new)
        self._shown = self._all.narrow(2, 0, end)
        return self._shown

    def cut(self, shown: torch.Tensor, count: int) -> torch.Tensor:
        """`shown` (B, G, S, D) without the last `count` columns."""
        cut = shown[:, :, :-count]
        if shown is self._shown:
            self._shown = cut
        return cut


def grow(cache: Any, index: int) -> None:
    """Let the layer `index` of `cache` grow in a room of its own, if it is one of Transformers' that only appends."""
    layers: Any = getattr(cache, "layers", ())
    if index < len(layers) and type(layers[index]) is DynamicLayer:
        layers[index] = GrowingLayer(layers[index])


def growing(config: Any) -> DynamicCache:
    """An empty cache, all layers of which grow, for a model that only appends."""
    cache = DynamicCache(config=config)
    for index in range(len(cache.layers)):
        grow(cache, index)
    return cache


def cut(cache: Any, length: int) -> None:
    """Forget all tokens of a cache, all layers of which grow, from `length` on."""
    for layer in cache.layers:
        layer.forget(layer.get_seq_length() - length)
