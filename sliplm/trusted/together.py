"""How a model computes the next tokens of several sequences in one pass, if it can at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sliplm.trusted.packed import Packed, Part
from sliplm.trusted.padded import Padded, only_appends

CLOSE = 1e-2
"""Logits may differ by so much of their standard deviation: rounding is far below, a wrong mask or position above."""

_log = logging.getLogger(__name__)


class Together(Protocol):
    """Passes of a model for several sequences.

    Attributes:
        ragged: whether a part of several tokens costs the others nothing.
    """

    ragged: bool

    def cache(self) -> Any:
        """For a new sequence."""
        ...

    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """The logits (n, V) that the parts want, in their order."""
        ...


def find_way(model: Any) -> Together | None:
    """The shortest way that has been rehearsed with this protected model: its code may treat positions or masks in ways
    that no class tells. None: its sequences are computed one by one."""
    if only_appends(model):
        apart = bool(model.slip.runs)  # of open blocks, the edge has a part of the cache, of one sequence
        for way in (None if apart else Packed.of(model), Padded(model, apart)):
            if way is not None and rehearse(model, way):
                return way
    _log.info("%s: requests are computed one by one, since its state allows no others beside it", type(model).__name__)
    return None


def rehearse(model: Any, way: Together) -> bool:
    """Whether sequences that come in parts, join and grow together, give the logits that each gives alone. No edge is
    needed: the trusted part of each layer does for that."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = (
        torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist() for n in (9, 5, 4)
    )
    a, b, c = way.cache(), way.cache(), way.cache()
    try:
        with model.slip.rehearsing(), torch.inference_mode():
            way.forward([Part(a, 0, first[:4], 0)])
            way.forward([Part(a, 4, first[4:7], 0), Part(b, 0, second[:3], 1)])
            got = [way.forward([Part(a, 7, first[7:8], 1), Part(b, 3, second[3:4], 1)])]
            # Guesses that are rejected: they count for nothing in the next pass.
            way.forward([Part(a, 8, third, 4), Part(b, 4, first[:2], 2)])
            got.append(way.forward([Part(b, 3, second[3:], 2), Part(c, 0, third, 1), Part(a, 8, first[8:], 1)]))
            texts = [first[:8], second[:4], second[:4], second, third, first]
            want = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts]
    except Exception as error:  # models may take other arguments, or have ideas of their own about caches
        _log.info("%s cannot compute several sequences at a time: %s", type(model).__name__, type(error).__name__)
        return False
    expected = torch.stack(want)
    return bool(((torch.cat(got) - expected).abs().amax(1) < CLOSE * expected.std(1)).all())
