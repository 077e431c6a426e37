"""Speculative decoding: guesses of what comes next, which the model checks in a pass that it makes anyway, so that one
pass, and its round trips, may give several tokens (Leviathan et al., arXiv 2211.17192; drafts from the text itself are
known as prompt lookup).

A guess is one fixed token. So the exact test is to pick each token as if there were no guess, and to go on as long as
it is the guessed one: the answer has the same distribution, the same text for the same seed, and whatever holds a token
to something sees no token that is not in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

LENGTHS = (4, 3, 2, 1)
"""Of a repetition: so many of the last tokens have come before in the same order."""

MODEL = 0
CHANCES = {4: 0.7, 3: 0.6, 2: 0.4, 1: 0.2, MODEL: 0.6}
"""By the length of a repetition, how likely the next token is to be what followed it before, while nothing is known of
this answer; and how likely it is to be a draft model's guess."""

PRIOR = 2.0
"""What is supposed counts as so many guesses that were seen."""

MEMORY, RETRY = 0.95, 0.98
"""What was seen counts so much after each further draft, and after each that was not worth making."""

PAD = 0.1
"""What is added to the price of a row, which uses up a pad: a guess has to be right at least so often, even where a
row costs no time."""


class Source(Protocol):
    """Says what may come next in one text."""

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with these."""
        ...

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow."""
        ...


class Lookup:
    """Where the end of a text has come before in it, and what followed there."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in LENGTHS}

    def extend(self, tokens: Iterable[int]) -> None:
        text = self._text
        for token in tokens:
            for length, after in self._after.items():
                if length <= len(text):
                    after[tuple(text[-length:])] = len(text)
            text.append(token)

    def repetition(self) -> int:
        """How many of the last tokens have come before; 0 for none."""
        return next((n for n, after in self._after.items() if tuple(self._text[-n:]) in after), 0)

    def guess(self, most: int) -> list[int]:
        """What followed the last time."""
        text, length = self._text, self.repetition()
        if not length:
            return []
        start = self._after[length][tuple(text[-length:])]
        period = len(text) - start  # what it runs into is its own beginning
        return [text[start + i % period] for i in range(most)]


class Drafts:
    """The drafts of one answer: as long as they are worth it, by how often those before were right.

    Attributes:
        rejected: how many tokens were guessed in vain.
    """

    def __init__(self, prompt: Iterable[int], model: Source | None = None) -> None:
        """With `model`, it guesses where the text itself has no better guess."""
        self.rejected = 0
        self._lookup, self._model = Lookup(), model
        self._seen = dict.fromkeys(CHANCES, (0.0, 0.0))  # by kind: guesses that were right, and all
        self._kind = 0
        self.extend(prompt)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with these."""
        tokens = list(tokens)
        self._lookup.extend(tokens)
        if self._model is not None:
            self._model.extend(tokens)

    def propose(self, most: int, price: float, model_price: float = 0.0) -> list[int]:
        """What may follow: `most` tokens at most, each as likely to be right as it costs, or likelier. `price` is what
        a row of a pass costs, as a part of what a token does; `model_price` is what a guess of the model's does."""
        source: Source = self._lookup
        self._kind = kind = self._lookup.repetition()
        if self._model is not None and (not kind or self.chance(kind) < self.chance(MODEL)):
            source, self._kind, price = self._model, MODEL, price + model_price
        if most < 1 or not (kind or self._model):
            return []
        chance = self.chance(self._kind)
        count = int(min(most, math.log(price + PAD) / math.log(min(chance, 0.999)))) if price + PAD < 1 else 0
        if not count:
            self._fade(self._kind, RETRY)
            return []
        return source.guess(count)

    def learn(self, proposed: int, accepted: int) -> None:
        """So many of the tokens that were proposed last were right; those behind a wrong one say nothing."""
        if not proposed:
            return
        self.rejected += proposed - accepted
        right, all_of_them = self._fade(self._kind, MEMORY)
        self._seen[self._kind] = right + accepted, all_of_them + accepted + (accepted < proposed)

    def chance(self, kind: int) -> float:
        """How likely a token of such a guess is to be right, if those before it are."""
        right, all_of_them = self._seen[kind]
        return (right + PRIOR * CHANCES[kind]) / (all_of_them + PRIOR)

    def _fade(self, kind: int, by: float) -> tuple[float, float]:
        right, all_of_them = self._seen[kind]
        self._seen[kind] = by * right, by * all_of_them
        return self._seen[kind]


class Pace:
    """What a pass takes, learned from those before: seconds = a + b rows."""

    KEPT = 0.98
    SLOPE, PRIOR = 0.1, 16.0
    """Of the mean time, what a row is supposed to take; it counts as much as a pass four rows larger than the mean."""
    STEEPEST = 0.25
    """Of a pass with one row, what a further row is taken to cost at most: a few passes that something else slowed down
    must not end all guesses, for then nothing better would be learned."""
    OUTLIER = 3.0

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._spread = self._both = 0.0

    def learn(self, rows: int, seconds: float) -> None:
        """A pass of so many rows has taken so long. One that took very long counts as three times what was expected:
        there may be no more like it."""
        if self._weight:
            seconds = min(seconds, self.OUTLIER * max(self._seconds, self._line(rows)))
        kept = self._weight * self.KEPT
        self._weight = kept + 1
        away, late = rows - self._rows, seconds - self._seconds
        self._rows += away / self._weight
        self._seconds += late / self._weight
        part = kept / self._weight
        self._spread = self.KEPT * self._spread + part * away * away
        self._both = self.KEPT * self._both + part * away * late

    @property
    def seconds(self) -> float:
        """Of a mean pass."""
        return self._seconds

    def price(self, sequences: int) -> float:
        """What one more row costs in a pass that gives each of so many sequences a token, as a part of what a token
        costs in it: 0 where rows cost nothing, 1 where a token's time is its row's."""
        if not self._weight or not self._seconds:
            return self.SLOPE
        rows = sequences * self._slope
        return min(1.0, rows / max(self._line(sequences), 1e-12))

    @property
    def _slope(self) -> float:
        slope = (self._both + self.PRIOR * self.SLOPE * self._seconds) / (self._spread + self.PRIOR)
        # That of a line through the mean pass, of which one row takes 1 / STEEPEST as long as a further one.
        steepest = self._seconds / (1 / self.STEEPEST + max(0.0, self._rows - 1))
        return min(max(slope, 0.0), steepest)

    def _line(self, rows: int) -> float:
        return max(0.0, self._seconds + (rows - self._rows) * self._slope)
