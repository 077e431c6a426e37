"""Token ids to text as they come, with what came before: many tokenizers drop a space where a text begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a decoder says for bytes that are no character, or not one yet."""

HELD = 8
"""After so many tokens that end in no character, what is certain of them is shown. A character has four bytes, but each
of many tokens may begin with the end of one and end with the beginning of the next."""

KEPT = 4
"""Of these tokens, so many may be part of a character that is still to come."""

CONTEXT = 6
"""So many tokens before an answer are enough to decode its first one as they would be together."""


def special_tokens(tokenizer: Any) -> set[int]:
    """The tokens that are no part of a text, as `decode` with `skip_special_tokens` sees it."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


class Text:
    """The text of an answer, one token after the other. An unfinished character is held back.

    Attributes:
        shown: what the reader gets: no special tokens.
        full: the same with them.
        count: tokens so far.
    """

    def __init__(self, tokenizer: Any, silent: set[int], before: Sequence[int] = ()) -> None:
        """`silent` are the tokens that are not shown. `before` comes before the answer, if it continues a text."""
        self.shown = self.full = ""
        self.count = self._known = 0
        self._tokenizer, self._silent = tokenizer, silent
        self._hidden: list[tuple[int, int]] = []  # where `full` has more than `shown`
        context = list(before[-CONTEXT:])
        self._restart([] if silent.issuperset(context) else context)

    def push(self, token: int) -> None:
        self.count += 1
        if token in self._silent:
            self.finish()
            start = len(self.full)
            self.full += self._decode([token])
            self._hidden.append((start, len(self.full)))
            self._restart([token] if self._window else [])  # else the text still begins
            return
        self._window.append(token)
        text = self._decode(self._window)
        # Most decoders have a sign for an unfinished character; some leave it out.
        if len(text) > self._known and not text.endswith(UNFINISHED):
            self.finish()
        elif len(self._window) - self._read >= HELD:
            unfinished = min(len(text) - len(text.rstrip(UNFINISHED)), KEPT - 1)
            self._show(text[self._known : len(text) - unfinished])
            self._restart(self._window[-KEPT:])
            self._known = max(0, self._known - unfinished)

    def finish(self) -> None:
        """Show what was held back. Source of the method, a window that slides by whole pieces: vLLM and TGI."""
        self._show(self._decode(self._window)[self._known :])
        self._restart(self._window[self._read :] or self._window)

    def shown_before(self, end: int) -> int:
        """How many characters of `shown` are before character `end` of `full`."""
        return end - sum(min(end, stop) - start for start, stop in self._hidden if start < end)

    def _show(self, piece: str) -> None:
        self.shown += piece
        self.full += piece

    def _restart(self, window: list[int]) -> None:
        """Decode the next tokens together with `window`, whose text is known."""
        self._window, self._read, self._known = window, len(window), len(self._decode(window))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text
