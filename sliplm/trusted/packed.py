"""One pass of a model of the common layout for the next tokens of many sequences, of whatever lengths: their tokens lie
one after the other as the rows of one input, and attention alone tells them apart (`native.Ragged`).

Every other step works row by row, so what a row gives does not depend on the company it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from sliplm._core import native
from sliplm.trusted.decoder import Short

MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Part(NamedTuple):
    """What a sequence brings to a pass: `tokens` that follow `start` others, which are in its `cache`.

    `wanted`: of how many, the last ones, the logits are wanted.
    """

    cache: Any
    start: int
    tokens: list[int]
    wanted: int


class Memory:
    """Keys and values of one sequence, in room to grow: (layers, 2, G, S, D)."""

    def __init__(self, layers: int, groups: int, size: int) -> None:
        self.array = np.empty((layers, 2, groups, 0, size), np.float32)

    def reserve(self, length: int) -> None:
        """Have room for so many tokens."""
        if length > (room := self.array.shape[3]):
            layers, two, groups, _, size = self.array.shape
            larger = np.empty((layers, two, groups, length + max(64, length // 4), size), np.float32)
            larger[:, :, :, :room] = self.array
            self.array = larger


class Packed:
    """Passes of one model. Its layers are called one after the other from here, as Transformers would, but without
    its and torch's calls in between."""

    ragged = True

    def __init__(self, model: Any, layers: Sequence[Short]) -> None:
        self._model, self._layers = model, layers

    @classmethod
    def of(cls, model: Any) -> Packed | None:
        """For a model all of whose layers go the short way, and no others."""
        if type(model).__name__ not in MODELS:
            return None
        layers = [layer.forward for layer in model.model.layers[: model.config.num_hidden_layers]]
        same = {(s.groups, s.size) if isinstance(s, Short) else None for s in layers}
        return None if len(same) != 1 or None in same else cls(model, layers)

    def cache(self) -> Memory:
        """For a new sequence."""
        return Memory(len(self._layers), self._layers[0].groups, self._layers[0].size)

    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """The logits (n, V) that the parts want. What it appends to caches counts for nothing until the
        caller says so with the next `start`: a pass that fails may be done again, as a whole or part by part."""
        assert native is not None
        lengths = [len(part.tokens) for part in parts]
        starts = [part.start for part in parts]
        for part, length in zip(parts, lengths, strict=True):
            part.cache.reserve(part.start + length)
        owners = np.repeat(np.arange(len(parts)), lengths)
        ends = np.cumsum(lengths)
        wanted = [np.arange(end - part.wanted, end) for part, end in zip(parts, ends, strict=True)]
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        sequences = native.Ragged([part.cache.array for part in parts], owners, positions)
        base = self._model.model
        embedded = base.embed_tokens(torch.tensor([[token for part in parts for token in part.tokens]]))
        cos, sin = (t[0].numpy() for t in base.rotary_emb(embedded, torch.from_numpy(positions)[None]))
        x = embedded[0].numpy()
        for layer in self._layers:
            x = layer.rows(x, cos, sin, partial(layer.ragged, sequences))
        logits: torch.Tensor = self._model.lm_head(base.norm(torch.from_numpy(x[np.concatenate(wanted)])))
        return logits
