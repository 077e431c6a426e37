"""One pass of any model with ordinary attention for the next tokens of several sequences: as Transformers does it, they
are filled up on the left to the longest, and a mask says so. Each keeps a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sliplm.trusted.cache import cut, growing
from sliplm.trusted.packed import Part


class Padded:
    """Passes of one model; if they are to be `apart`, each sequence has its own."""

    def __init__(self, model: Any, apart: bool = False) -> None:
        self._model, self._apart = model, apart
        self.ragged = apart

    def cache(self) -> DynamicCache:
        """For a new sequence."""
        return growing(self._model.config)

    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """See `Packed.forward`. Parts of one token share a pass, others take one each."""
        alone = [[i] for i, part in enumerate(parts) if self._apart or len(part.tokens) > 1]
        together = [i for i, part in enumerate(parts) if not self._apart and len(part.tokens) == 1]
        rows: dict[int, torch.Tensor] = {}
        for some in [together, *alone] if together else alone:
            logits = self._pass([parts[i] for i in some])
            rows |= {i: row[len(row) - parts[i].wanted :] for i, row in zip(some, logits, strict=True)}
        return torch.cat([rows[i] for i in sorted(rows)])

    def _pass(self, parts: Sequence[Part]) -> torch.Tensor:
        """The logits (B, n, V) after the last tokens of each part, as many as any wants; all have as many tokens."""
        for part in parts:
            cut(part.cache, part.start)  # what a pass that failed, or guesses that were wrong, have left
        count = len(parts[0].tokens)
        starts = torch.tensor([part.start for part in parts])
        longest = int(starts.max())
        wanted = max(1, *(part.wanted for part in parts))
        out = self._model(
            input_ids=torch.tensor([part.tokens for part in parts]),
            position_ids=starts[:, None] + torch.arange(count),
            attention_mask=(torch.arange(longest + count) >= longest - starts[:, None]).long(),
            past_key_values=parts[0].cache if len(parts) == 1 else _Together([p.cache for p in parts], longest),
            use_cache=True,
            logits_to_keep=wanted,
        )
        logits: torch.Tensor = out.logits[:, -wanted:]
        return logits


class _Together(Cache):  # type: ignore[misc]
    """The caches of several sequences, the longest of which has `length` tokens, as one of a batch."""

    def __init__(self, caches: list[DynamicCache], length: int) -> None:
        super().__init__(layers=[])
        self._caches, self._length = caches, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, G, T, D) to each sequence's; all of them, filled up on the left."""
        seen = []
        for b, cache in enumerate(self._caches):
            seen.append(cache.update(key_states[b : b + 1], value_states[b : b + 1], layer_idx))
        keys, values = zip(*seen, strict=True)
        return _filled_up(keys), _filled_up(values)


def _filled_up(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, G, S, D) of different S as one (B, G, S, D), with zeros on the left."""
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    longest = max(t.shape[2] for t in tensors)
    whole = first.new_zeros(len(tensors), first.shape[1], longest, first.shape[3])
    for b, tensor in enumerate(tensors):
        whole[b, :, longest - tensor.shape[2] :] = tensor[0]
    return whole


def only_appends(model: Any) -> bool:
    """Whether all that `model` keeps of a text is keys and values of every token, by Transformers' own cache."""
    if not model._supports_default_dynamic_cache():
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a configuration of a kind that Transformers' cache does not know
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
