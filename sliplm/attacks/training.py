"""Train a thief's model on little text, and watch the perplexity on text that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LENGTH = 256  # tokens per window
POINTS = 2  # of a learning curve, after the start; one if it is short
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass
class Data:
    """Token windows, disjoint: `train` (n, LENGTH) and `valid` (v, LENGTH) are the thief's budget, which chooses its
    learning rate on the latter; `held` (m, LENGTH) scores it.

    Ids count within `vocabulary`, the tokenizer's ids (V,) that occur in any of them: `stolen.trim` cuts models to it.
    """

    train: torch.Tensor
    valid: torch.Tensor
    held: torch.Tensor
    vocabulary: torch.Tensor


@dataclass
class Curve:
    """One run: perplexity on the held-out text after so many training tokens, and on the validation text at the end."""

    rate: float = 0.0
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    ppl: list[float] = field(default_factory=list)
    valid: float = math.inf


def language_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token (nats)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of all of `windows` (m, LENGTH); a model that has diverged gets e^700."""
    model.eval()
    with autocast():
        loss = sum(float(language_loss(model, ids)) * len(ids) for ids in windows.split(4)) / len(windows)
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.exp(700.0)


def learn(
    model: Any,
    chosen: Sequence[nn.Parameter],
    data: Data,
    rate: float,
    seed: int,
    loss: Loss = language_loss,
    start: float | None = None,
) -> Curve:
    """Train the parameters `chosen` of `model` in one pass over `data.train`, in an order that `seed` decides.

    AdamW, linear warm-up over a tenth and decay to zero; bfloat16 products where the processor has them.
    `start`: the model's perplexity on `data.held`, if it is known already.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    train = data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))]
    long = len(train) >= 32
    batches = train.split(2 if long else 1)
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.0, (len(batches) - i) / max(1, len(batches) - warm)))
    )
    points = POINTS if long else 1
    marks = {max(1, round(len(batches) * (i + 1) / points)) for i in range(points)}
    curve = Curve(rate, seed, [0], [perplexity(model, data.held) if start is None else start])
    seen = 0
    for step, ids in enumerate(batches, 1):
        model.train()
        with autocast():
            value = loss(model, ids)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        seen += ids.numel()
        if step in marks:
            curve.tokens.append(seen)
            curve.ppl.append(perplexity(model, data.held))
    curve.valid = perplexity(model, data.valid)
    return curve


def autocast() -> Any:
    """bfloat16 products, where the processor has them: elsewhere they are emulated, hundreds of times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())
