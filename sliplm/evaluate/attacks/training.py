"""Train a thief's model on little text, and watch the perplexity on text that it has not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LENGTH = 256  # tokens per window
POINTS = 4  # of a learning curve, after the start
RATES = (3e-4, 2e-3)
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass
class Data:
    """Token windows, disjoint: `train` (n, LENGTH) for the thief, `held` (m, LENGTH) to score it."""

    train: torch.Tensor
    held: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.train.numel()


@dataclass
class Curve:
    """Perplexity on the held-out text after so many training tokens, at the best learning rate tried."""

    tokens: list[int] = field(default_factory=list)
    ppl: list[float] = field(default_factory=list)
    rate: float = 0.0

    @property
    def best(self) -> float:
        return min(self.ppl)


def language_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token (nats)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, held: torch.Tensor) -> float:
    model.eval()
    with _autocast():
        loss = sum(float(language_loss(model, ids[None])) for ids in held) / len(held)
    return math.exp(min(loss, 700.0))


def learn(
    start: Any,
    select: Callable[[Any], Sequence[nn.Parameter]],
    data: Data,
    loss: Loss = language_loss,
    rates: Sequence[float] = RATES,
) -> Curve:
    """Train the parameters that `select` picks, one pass over `data.train` per learning rate; keep the best curve.

    AdamW, linear warm-up over a tenth and decay to zero; bfloat16 products. Every thief gets the same search.
    """
    curves = []
    first = perplexity(start, data.held)
    for rate in rates:
        model = copy.deepcopy(start) if len(rates) > 1 else start
        for p in model.parameters():
            p.requires_grad_(False)
        chosen = list(select(model))
        for p in chosen:
            p.requires_grad_(True)
        curves.append(_run(model, chosen, data, loss, rate, Curve([0], [first], rate)))
    return min(curves, key=lambda c: c.best)


def _run(model: Any, chosen: Sequence[nn.Parameter], data: Data, loss: Loss, rate: float, curve: Curve) -> Curve:
    batch = max(1, min(4, len(data.train) // 16))
    steps = math.ceil(len(data.train) / batch)
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm)))
    )
    marks = {max(1, round(steps * (i + 1) / POINTS)) for i in range(POINTS)}
    for step in range(steps):
        ids = data.train[step * batch : (step + 1) * batch]
        model.train()
        with _autocast():
            value = loss(model, ids)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        if step + 1 in marks:
            curve.tokens.append(min((step + 1) * batch, len(data.train)) * data.train.shape[1])
            ppl = perplexity(model, data.held)
            curve.ppl.append(ppl if math.isfinite(ppl) else math.exp(700.0))
    return curve


def _autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)
