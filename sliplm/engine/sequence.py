"""One of the answers that are generated together: its tokens so far, how it picks the next one, and when it is over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf

from sliplm.engine.answer import Answer, Token
from sliplm.engine.drafts import Drafts
from sliplm.engine.logprobs import Scores
from sliplm.errors import locate
from sliplm.trusted.packed import Part

if TYPE_CHECKING:
    from sliplm.engine.batch import Batch

_log = logging.getLogger(__name__)


class Sequence(Answer):
    """A prompt and its answer.

    Attributes:
        batch: which it has joined.
        over: whether nothing is left to compute for it.
        left: set when its batch has nothing to do with it any more.
        begun: whether it has its first token.
    """

    batch: Batch

    def __init__(
        self,
        prompt: list[int],
        limit: int,
        ends: Collection[int],
        processors: tf.LogitsProcessorList,
        scores: Scores | None,
        cache: Any,
        drafts: Drafts | None = None,
    ) -> None:
        """At most `limit` tokens, and none after one of `ends`. `scores` is among the `processors`, if logprobs are
        wanted; `cache` is an empty one of the model's; `drafts` guess what comes next."""
        super().__init__()
        self._ids = torch.tensor([prompt])  # with room after them
        self._count, self._known = len(prompt), 0
        self._limit, self._ends = len(prompt) + limit, ends
        self._processors, self._scores, self._cache, self._drafts = processors, scores, cache, drafts
        self.over = self.begun = False
        self.left = threading.Event()

    @property
    def pending(self) -> int:
        """How many of its tokens the model has not seen."""
        return self._count - self._known

    def part(self, most: int, price: float = 1.0, model_price: float = 0.0) -> Part:
        """Its next tokens for a pass, `most` of them at most; behind the last one guesses, as far as they are worth
        their price, see `Drafts.propose`."""
        end = min(self._count, self._known + most)
        tokens = self._ids[0, self._known : end].tolist()
        if end < self._count:
            return Part(self._cache, self._known, tokens, 0)
        guesses = []
        if self.begun and self._drafts is not None and price < 1:
            # Of the tokens that may still come, the last needs no guess: none is picked behind it.
            most = min(most - len(tokens), self._limit - self._count - 1)
            try:
                guesses = self._drafts.propose(most, price, model_price)
            except Exception as error:  # a draft model's code; no answer needs it
                _log.warning("an answer goes on without guesses: %s", locate(error))
                self._drafts = None
        return Part(self._cache, self._known, tokens + guesses, 1 + len(guesses))

    def seen(self, part: Part, logits: torch.Tensor) -> None:
        """The model has seen `part`, and says `logits` (wanted, V) of what follows each of its last tokens: pick the
        next one, and as long as that has been guessed, another; hand them to the reader. Raises whatever a processor
        does."""
        guesses = part.tokens[len(part.tokens) - part.wanted + 1 :] if part.wanted else []
        self._known = part.start + len(part.tokens) - len(guesses)
        right = 0
        for row in logits:
            token = self._pick(row[None])
            guessed = right < len(guesses) and token == guesses[right]
            self._append(token, guessed)
            if not guessed or self.over:
                right += guessed
                break
            right += 1
            self._known += 1
        if self._drafts is not None:
            self._drafts.learn(len(guesses), right)
            self.rejected = self._drafts.rejected
        if self.over:  # whoever is told of the end may read all else
            self.finish()

    def _pick(self, logits: torch.Tensor) -> int:
        scores = self._processors(self._ids[:, : self._count], logits.float())  # type: ignore[arg-type]
        return int(scores.numpy().argmax())  # torch's takes ten times as long and more

    def _append(self, token: int, guessed: bool) -> None:
        if self._count == self._ids.shape[1]:
            self._ids = torch.nn.functional.pad(self._ids, (0, 64 + self._count // 4))
        self._ids[0, self._count] = token
        self._count += 1
        self.begun = True
        if self._drafts is not None:
            self._drafts.extend([token])
        self.put(Token(token, self._scores.of(token) if self._scores else None, guessed))
        self.ended = token in self._ends
        if self.ended or self._count == self._limit:
            self.over = True

    def fail(self, error: BaseException) -> None:
        self.over = True
        super().fail(error)

    def _wait(self) -> None:
        self.left.wait()
        self.batch.wait_if_over()
