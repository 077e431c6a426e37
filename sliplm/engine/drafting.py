"""Who guesses the tokens of answers: the text itself, a small model besides, or nobody."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from sliplm.engine.drafts import Drafts
from sliplm.errors import SlipError
from sliplm.trusted.cache import cut, growing
from sliplm.trusted.padded import only_appends

LOOKUP, NONE, MODEL = "lookup", "none", "model:"


class Drafting:
    """Makes the drafts of answers.

    Attributes:
        seconds: what a guess takes; 0 for what the text itself has.
    """

    def __init__(self, kind: str, tokenizer: Any, vocabulary: int) -> None:
        """`kind` is "lookup", "none" or "model:DIR", a directory as Transformers saves models, which is run here.
        `tokenizer` and `vocabulary`, the number of logits, are the protected model's. Raises SlipError: there is no
        such kind, or no such model that knows the same tokens."""
        self._guessing = kind != NONE
        self._model = DraftModel(kind.removeprefix(MODEL), tokenizer, vocabulary) if kind.startswith(MODEL) else None
        if self._model is None and kind not in (LOOKUP, NONE):
            raise SlipError(f"{kind!r} guesses no tokens: write {LOOKUP}, {NONE} or {MODEL}DIR.")

    @property
    def seconds(self) -> float:
        return 0.0 if self._model is None else self._model.seconds

    def drafts(self, prompt: list[int]) -> Drafts | None:
        """For an answer to `prompt`; None if nobody guesses."""
        return Drafts(prompt, None if self._model is None else self._model.text()) if self._guessing else None


class DraftModel:
    """A small model with the protected one's tokens, run on the trusted side. It is no secret.

    Attributes:
        seconds: what a guessed token takes, on average lately.
    """

    def __init__(self, directory: str, tokenizer: Any, vocabulary: int) -> None:
        path = Path(directory)
        if not path.is_dir():
            raise SlipError(f"{directory} is no directory with a draft model.")
        try:
            own = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        except Exception as error:  # Transformers raises whatever its parsers do
            raise SlipError(f"the draft model in {path} cannot be loaded ({type(error).__name__}).") from None
        if own.get_vocab() != tokenizer.get_vocab():
            raise SlipError(f"the draft model in {path} has other tokens than the protected one.")
        if not only_appends(self.model):
            raise SlipError(
                f"the draft model in {path} cannot take tokens back: its cache is more than keys and values."
            )
        self.vocabulary = vocabulary
        self.room: float = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.seconds = 0.0

    def text(self) -> _Text:
        """For one answer."""
        return _Text(self)


class _Text:
    """A text that a draft model goes on with."""

    def __init__(self, drafter: DraftModel) -> None:
        self._drafter = drafter
        self._tokens: list[int] = []
        self._known = 0  # of these, the cache has so many; behind them are guesses
        self._cache = growing(drafter.model.config)

    def extend(self, tokens: Iterable[int]) -> None:
        self._tokens.extend(tokens)

    def guess(self, most: int) -> list[int]:
        """The likeliest tokens, one after the other; none where the model has no positions for so long a text."""
        drafter, begin = self._drafter, time.perf_counter()
        if len(self._tokens) + most > drafter.room:
            return []
        cut(self._cache, self._known)
        new, guesses = self._tokens[self._known :], list[int]()
        for _ in range(most):
            out = drafter.model(
                input_ids=torch.tensor([new]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            new = [int(out.logits[0, -1, : drafter.vocabulary].argmax())]
            guesses += new
        if self._known:  # the first time, all of the prompt is read
            drafter.seconds += 0.1 * ((time.perf_counter() - begin) / most - drafter.seconds)
        self._known = len(self._tokens)
        return guesses
