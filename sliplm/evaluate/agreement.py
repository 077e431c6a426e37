"""How closely a model agrees with the original in float32: perplexity, KL divergence, top-1, logits, greedy text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

Windows = torch.Tensor  # token ids (windows, length)


@dataclass(frozen=True)
class Agreement:
    """Over all predicted tokens: perplexity `ppl`; and against the reference in float32: `kl` mean and `kl_max` worst
    KL divergence (nats), `top1` share of equal most likely tokens, `max_abs_logit_error`, and `rms_logit_error`
    relative to the standard deviation of the reference's logits."""

    ppl: float
    kl: float
    kl_max: float
    top1: float
    max_abs_logit_error: float
    rms_logit_error: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def windows(tokenizer: Any, text: str, tokens: int, length: int) -> Windows:
    """The first `tokens` tokens of `text` as windows of `length`: int64 (tokens // length, length)."""
    # Cut the text before tokenizing: token ids beyond what is needed cost time and a warning.
    ids = tokenizer(text[: tokens * 16], return_tensors="pt", add_special_tokens=False)["input_ids"][0][:tokens]
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)


@torch.inference_mode()
def compare(
    models: dict[str, nn.Module],
    reference: nn.Module,
    data: Windows,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, dict[str, Agreement]]:
    """Perplexity of `reference`, and the agreement of each of `models` with it, window by window.

    Logits are compared in float64. Memory: one window's logits per model.
    """
    sums = {name: {"nll": 0.0, "kl": 0.0, "kl_max": 0.0, "top1": 0, "max": 0.0, "square": 0.0} for name in models}
    reference_nll = spread = 0.0
    count = 0
    for number, window in enumerate(data):
        ids = window[None]
        logits = reference(input_ids=ids, use_cache=False).logits[0].double()
        log_p = logits.log_softmax(-1)
        target = window[1:, None]
        reference_nll -= float(log_p[:-1].gather(1, target).sum())
        spread += float(logits.var(dim=-1).sum())
        count += len(window)
        for name, model in models.items():
            other = model(input_ids=ids, use_cache=False).logits[0].double()
            log_q = other.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            s = sums[name]
            s["nll"] -= float(log_q[:-1].gather(1, target).sum())
            s["kl"] += float(kl.sum())
            s["kl_max"] = max(s["kl_max"], float(kl.max()))
            s["top1"] += int((logits.argmax(-1) == other.argmax(-1)).sum())
            s["max"] = max(s["max"], float((logits - other).abs().max()))
            s["square"] += float((logits - other).square().mean(-1).sum())
        if progress:
            progress(number + 1, len(data))
    predicted = count - len(data)
    result = {
        name: Agreement(
            ppl=_exp(s["nll"] / predicted),
            kl=s["kl"] / count,
            kl_max=s["kl_max"],
            top1=s["top1"] / count,
            max_abs_logit_error=s["max"],
            rms_logit_error=math.sqrt(s["square"] / spread),
        )
        for name, s in sums.items()
    }
    return _exp(reference_nll / predicted), result


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@dataclass(frozen=True)
class GreedyReport:
    """Greedy texts compared token by token.

    `unexplained` counts texts that part from the reference where its two best logits are further apart than
    twice the largest logit error measured at that step: those would be real differences.
    """

    prompts: int
    identical: int
    ties: int
    unexplained: int


@torch.inference_mode()
def compare_greedy(
    model: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> GreedyReport:
    """Continue each prompt greedily for `tokens` tokens with both models."""
    identical = ties = 0
    for number, prompt in enumerate(prompts):
        inputs = tokenizer(prompt, return_tensors="pt")
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        a = reference.generate(**inputs, **settings)[0]
        b = model.generate(**inputs, **settings)[0]
        if torch.equal(a, b):
            identical += 1
        else:
            same = int((a != b).nonzero()[0])
            ids = a[None, :same]
            want = reference(input_ids=ids).logits[0, -1].double()
            got = model(input_ids=ids).logits[0, -1].double()
            gap = float(want[a[same]] - want[b[same]])
            ties += gap <= 2 * float((want - got).abs().max())
        if progress:
            progress(number + 1, len(prompts))
    return GreedyReport(len(prompts), identical, ties, len(prompts) - identical - ties)
