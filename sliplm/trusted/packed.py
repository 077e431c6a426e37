"""One pass of a model of the common layout for the next tokens of many sequences, of whatever lengths: their tokens lie
one after the other as the rows of one input, and attention alone tells them apart (`native.Ragged`).

Every other step works row by row, so what a row gives does not depend on the company it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sliplm._core import native
from sliplm.trusted.decoder import Short

MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}

_NO_MASK = torch.zeros(1, 1, 1, 1)
"""Transformers makes none if it is given one of four dimensions; the short way then looks at none."""


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
    """Passes of one model."""

    ragged = True

    def __init__(self, model: Any, layers: int, groups: int, size: int) -> None:
        self._model, self._shape = model, (layers, groups, size)

    @classmethod
    def of(cls, model: nn.Module) -> Packed | None:
        """For a model all of whose layers go the short way, and no others."""
        short = [m.forward for m in model.modules() if isinstance(m.forward, Short)]
        shapes = {(s.groups, s.size) for s in short}
        layers = getattr(model.config, "num_hidden_layers", 0)
        if type(model).__name__ not in MODELS or len(short) != layers or len(shapes) != 1:
            return None
        return cls(model, layers, *shapes.pop())

    def cache(self) -> Memory:
        """For a new sequence."""
        return Memory(*self._shape)

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
        rows = native.Ragged([part.cache.array for part in parts], owners, positions)
        out = self._model(
            input_ids=torch.tensor([[token for part in parts for token in part.tokens]]),
            position_ids=torch.from_numpy(positions)[None],
            attention_mask=_NO_MASK,
            past_key_values=rows,
            use_cache=True,
            logits_to_keep=torch.from_numpy(np.concatenate(wanted)),
        )
        logits: torch.Tensor = out.logits[0]
        return logits
