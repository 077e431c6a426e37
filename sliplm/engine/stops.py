"""What ends an answer: the model's own end tokens, and the texts that a request names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sliplm.engine.detokenise import UNFINISHED, Text
from sliplm.engine.template import Chat


def end_tokens(tokenizer: Any, configured: Any, chat: Chat, vocabulary: int) -> list[int]:
    """The tokens that end an answer, of which any source may know only some: `configured` (`eos_token_id` of
    generation_config.json: a number, a list or nothing), the tokenizer, and the chat template's end of a turn.
    `vocabulary` is the number of logits: there are configurations that name ends beyond."""
    listed = configured if isinstance(configured, list) else [configured]
    found = [*listed, tokenizer.eos_token_id, chat.end_of_turn()]
    return sorted({token for token in found if isinstance(token, int) and 0 <= token < vocabulary})


class StopTexts:
    """Looks for the stop texts `texts` in an answer. Those that contain a special token, by its text, are looked for
    where such tokens are still there; the others in what the reader sees."""

    def __init__(self, texts: Iterable[str], special: Iterable[str]) -> None:
        markers = [s for s in special if s]
        self._full: list[str] = []
        self._shown: list[str] = []
        for text in texts:
            (self._full if any(s in text for s in markers) else self._shown).append(text)

    def find(self, text: Text) -> int | None:
        """Where `text.shown` ends, if a stop text has come."""
        ends = [at for stop in self._shown if (at := text.shown.find(stop)) >= 0]
        ends += [text.shown_before(at) for stop in self._full if (at := text.full.find(stop)) >= 0]
        return min(ends, default=None)

    def certain(self, text: Text) -> int:
        """So much of `text.shown` is not the beginning of a stop text, and whole characters."""
        full = text.shown_before(len(text.full) - _begun(text.full, self._full))
        shown = len(text.shown) - _begun(text.shown, self._shown)
        return min(full, shown, len(text.shown.rstrip(UNFINISHED)))


def _begun(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a stop text."""
    longest = max((len(s) for s in stops), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
