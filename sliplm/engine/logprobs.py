"""Log-probabilities of generated tokens, and the text that each of them stands for."""

from __future__ import annotations

from typing import Any

import torch

from sliplm.protocol.messages import TokenLogprob

NEGLIGIBLE = -9999.0
"""What OpenAI's API says instead of minus infinity, which JSON cannot."""

Scored = tuple[float, list[tuple[int, float]]]
"""The log-probability of a token, and (token, log-probability) of the likeliest ones in its place."""


class Scores:
    """A logits processor that changes nothing and remembers the model's own distribution of the last step."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._row = torch.empty(0)

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._row = scores[0].float().log_softmax(-1).clamp(min=NEGLIGIBLE)
        return scores

    def of(self, token: int) -> Scored:
        values, ids = self._row.topk(min(self._top, len(self._row)))
        return float(self._row[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


class Logprobs:
    """Holds the log-probabilities of tokens back until the text that they begin with is sent."""

    def __init__(self, tokenizer: Any, previous: int, silent: set[int]) -> None:
        """`previous` is the token before the first one: some tokenizers drop a space where a text begins. Tokens that
        are `silent` are no part of the text."""
        self._tokenizer, self._previous = tokenizer, previous
        self._silent = silent
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._end = 0

    def push(self, token: int, scored: Scored | None, end: int) -> None:
        """Add a token, after which the text has `end` characters."""
        if scored is None:
            return
        if token not in self._silent:
            top = [(self._text(t), p) for t, p in scored[1]]
            self._waiting.append((self._end, TokenLogprob(self._text(token), scored[0], top)))
        self._previous, self._end = token, end

    def before(self, end: int) -> list[TokenLogprob]:
        """Hand out those of the tokens that begin before character `end`."""
        count = sum(start < end for start, _ in self._waiting)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return [logprob for _, logprob in ready]

    def _text(self, token: int) -> str:
        alone, both = self._tokenizer.decode([self._previous]), self._tokenizer.decode([self._previous, token])
        in_context = both.startswith(alone) and not alone.endswith("\ufffd")
        return both[len(alone) :] if in_context else self._tokenizer.decode([token])
