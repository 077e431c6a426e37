"""Generation of one answer by itself, for models that cannot compute several at a time: Transformers' `generate`, in a
thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers.generation.streamers import BaseStreamer

from sliplm.engine.answer import Answer, Token, cancellable
from sliplm.engine.logprobs import Scores
from sliplm.exchange.link import Link, Router


class Alone(Answer):
    """One answer, and the thread that generates it."""

    def __init__(
        self,
        model: Any,
        prompt: list[int],
        settings: tf.GenerationConfig,
        processors: tf.LogitsProcessorList,
        scores: Scores | None,
        link: Link | Router,
    ) -> None:
        """Begins at once. `scores` is among the `processors`, if logprobs are wanted."""
        super().__init__()
        self._model, self._prompt, self._settings = model, prompt, settings
        self._processors, self._scores = processors, scores
        self._link = cancellable(link, self.cancelled.is_set)
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            ids = torch.tensor([self._prompt])
            with self._model.slip.using(self._link), torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings,
                    logits_processor=self._processors,
                    streamer=_Tokens(self._put_in_turn, self._scores),
                    stopping_criteria=[lambda ids, _: torch.full((len(ids),), self.cancelled.is_set())],
                )
            self.ended = int(out[0, -1]) in (self._settings.eos_token_id or ())
            self.finish()
        except BaseException as error:
            self.fail(error)

    def _put_in_turn(self, token: Token) -> None:
        """Hand `token` to the reader; wait while it has too many already, unless it has gone."""
        while self.full and not self.cancelled.is_set():
            self.wake.wait()
            self.wake.clear()
        self.put(token)

    def _wait(self) -> None:
        self._thread.join()


class _Tokens(BaseStreamer):
    """Pass on generated tokens; the first call brings the prompt."""

    def __init__(self, out: Callable[[Token], None], scores: Scores | None) -> None:
        self._out, self._scores = out, scores
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            for token in value.reshape(-1).tolist():
                self._out(Token(token, self._scores.of(token) if self._scores else None))
        self._prompt = False

    def end(self) -> None:
        """`Alone` says when it is over."""
