"""One of the answers that are generated together: its tokens so far, how it picks the next one, and when it is over."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf

from sliplm.engine.answer import Answer
from sliplm.engine.logprobs import Scores
from sliplm.trusted.packed import Part

if TYPE_CHECKING:
    from sliplm.engine.batch import Batch


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
    ) -> None:
        """At most `limit` tokens, and none after one of `ends`. `scores` is among the `processors`, if logprobs are
        wanted; `cache` is an empty one of the model's."""
        super().__init__()
        self._ids = torch.tensor([prompt])  # with room after them
        self._count, self._known = len(prompt), 0
        self._limit, self._ends = len(prompt) + limit, ends
        self._processors, self._scores, self._cache = processors, scores, cache
        self.over = self.begun = False
        self.left = threading.Event()

    @property
    def pending(self) -> int:
        """How many of its tokens the model has not seen."""
        return self._count - self._known

    def part(self, most: int) -> Part:
        """Its next tokens for a pass, `most` of them at most."""
        end = min(self._count, self._known + most)
        return Part(self._cache, self._known, self._ids[0, self._known : end].tolist(), end == self._count)

    def seen(self, part: Part, logits: torch.Tensor | None) -> None:
        """The model has seen `part`, and if that was the last one, says `logits` (1, V) of what follows: pick a token
        and hand it to the reader. Raises whatever a processor does."""
        self._known = part.start + len(part.tokens)
        if logits is None:
            return
        scores = self._processors(self._ids[:, : self._count], logits.float())  # type: ignore[arg-type]
        token = int(scores.argmax())
        if self._count == self._ids.shape[1]:
            self._ids = torch.nn.functional.pad(self._ids, (0, 64 + self._count // 4))
        self._ids[0, self._count] = token
        self._count += 1
        self.begun = True
        self.put((token, self._scores.of(token) if self._scores else None))
        self.ended = token in self._ends
        if self.ended or self._count == self._limit:
            self.over = True
            self.finish()

    def fail(self, error: BaseException) -> None:
        self.over = True
        super().fail(error)

    def _wait(self) -> None:
        self.left.wait()
        self.batch.wait_if_over()
