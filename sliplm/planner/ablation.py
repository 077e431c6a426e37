"""A model with parts taken away for a moment, and its perplexity then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sliplm.errors import SlipError, UnsupportedModelError
from sliplm.evaluate import agreement
from sliplm.evaluate.text import read_text
from sliplm.open.blocks import block_list, block_of
from sliplm.split.factors import Factors, leading
from sliplm.split.groups import find_layers
from sliplm.split.layers import Member
from sliplm.split.source import continues_text, load_whole
from sliplm.split.tokenizer import read_tokenizer

WINDOW = 256

Layer = tuple[Member, ...]


class Subject:
    """A model, in float32, and the text that it is measured on.

    Attributes:
        layers: of every block, by their names within it.
        windows: token ids (n, WINDOW).
    """

    def __init__(self, model: str, text_file: Path | None, tokens: int) -> None:
        """Raises SlipError: the model does not continue text, or the text is too short."""
        self.model: Any = load_whole(model)
        if not continues_text(self.model.config):
            raise UnsupportedModelError(f"{model} does not continue text: it has no perplexity.")
        place = block_list(self.model)
        self.blocks = list(self.model.get_submodule(place))
        self.layers: list[dict[str, Layer]] = [{} for _ in self.blocks]
        for name, found in find_layers(self.model).items():
            if (number := block_of(name, place)) is not None:
                self.layers[number][name.removeprefix(f"{place}.{number}.")] = found
        tokenizer = read_tokenizer(model)
        if tokenizer is None:
            raise UnsupportedModelError(f"{model} has no tokenizer, so no text can be measured.")
        self.windows = agreement.windows(tokenizer, read_text(text_file), tokens, WINDOW)
        if self.windows.numel() < 2:
            raise SlipError("the text is too short to measure on.")

    @torch.inference_mode()
    def perplexity(self) -> float:
        total = 0.0
        for ids in self.windows:
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, ids[1:]))
        return math.exp(min(total / len(self.windows), 700.0)) if math.isfinite(total) else math.exp(700.0)

    def skipped(self, number: int) -> Any:
        """A context in which the block gives back what it gets."""
        return _computing(self.blocks[number], _like(self.blocks[number]))

    @contextmanager
    def random(self, number: int) -> Iterator[None]:
        """A context in which the block's matrices are random, as a thief's without it would be; norms stay."""
        spread = getattr(self.model.config, "initializer_range", None) or 0.02
        generator = torch.Generator().manual_seed(number)
        with ExitStack() as changed:
            for found in self.layers[number].values():
                for weight in self._weights(found):
                    changed.enter_context(_changed(weight))
                    weight.copy_(spread * torch.randn(weight.shape, generator=generator))
            yield

    def factors(self, found: Layer, rank: int) -> list[Factors]:
        """Leading singular triplets of a layer's matrices."""
        generator = torch.Generator().manual_seed(0)
        return [leading(self._matrix(m).float().contiguous(), rank, generator) for m in found]

    @contextmanager
    def without(self, found: Layer, factors: Sequence[Factors], rank: int) -> Iterator[None]:
        """A context in which the layer's matrices lack their `rank` leading components."""
        with ExitStack() as changed:
            for weight in self._weights(found):
                changed.enter_context(_changed(weight))
            for m, f in zip(found, factors, strict=True):
                self._matrix(m).sub_((f.u[:, :rank] * f.s[:rank]) @ f.vt[:rank])
            yield

    @contextmanager
    def from_block(self, number: int) -> Iterator[None]:
        """A context in which the blocks before this one are not computed again: their outputs are remembered. Nothing
        in them may be changed meanwhile."""
        if number == 0:
            yield
            return
        last, known = self.blocks[number - 1], list[Any]()
        with _computing(last, partial(_recorded, last.forward, known)):
            self.perplexity()
        with ExitStack() as idle:
            for block in self.blocks[: number - 1]:
                idle.enter_context(_computing(block, _like(block)))
            turn = iter(range(1 << 60))
            idle.enter_context(_computing(last, lambda *_, **__: known[next(turn) % len(known)]))
            yield

    def _weights(self, found: Layer) -> list[torch.Tensor]:
        return [self.model.get_parameter(name).data for name in dict.fromkeys(m.weight for m in found)]

    def _matrix(self, m: Member) -> torch.Tensor:
        """A view of the model's own weight."""
        whole: torch.Tensor = self.model.get_parameter(m.weight).data
        return m.matrix(whole.view(m.parts, -1)[m.part])


@contextmanager
def _changed(weight: torch.Tensor) -> Iterator[None]:
    """`weight` is afterwards as it was."""
    before = weight.clone()
    try:
        yield
    finally:
        weight.copy_(before)


@contextmanager
def _computing(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The block has another forward."""
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _recorded(forward: Callable[..., Any], into: list[Any], *args: Any, **kwargs: Any) -> Any:
    into.append(forward(*args, **kwargs))
    return into[-1]


def _like(block: nn.Module) -> Callable[..., Any]:
    """A forward that gives back the hidden states that it gets."""
    return lambda hidden_states, *_, **__: hidden_states
