"""Text that no public model can know: English whose content words are replaced by those of an invented language.

The English is the prose that every Python carries (`pydoc_data.topics`); the words are drawn from a seed. Function
words and short words stay, so the grammar is known and the lexicon is not. Paragraphs are dealt to the owner, the thief
and the held-out text at random: all three speak one language, and no paragraph occurs in two of them.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch

from sliplm.attacks.training import LENGTH
from sliplm.errors import SlipError

SEED = 2411
_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "sk",
    "t",
    "tr",
    "v",
    "z",
)
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "l", "m", "n", "r", "sh", "th")
_WORDS = """
    also been before being both cannot does each either even from have however into itself just less like many more
    most must only other otherwise over same should since some such than that their them then there therefore these they
    this those though through thus under unless until upon used using very well were what when where whether which while
    will with within without would your"""
_KEPT = frozenset(_WORDS.split())
_CONTENT = re.compile(r"[A-Za-z]{4,}")


def paragraphs() -> list[str]:
    """The prose of the documentation, each paragraph once, in an order that the seed decides."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        for part in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(part.split())
            letters = sum(map(len, re.findall(r"[A-Za-z']+", text)))
            if len(text) >= 80 and letters > 0.65 * len(text):  # no code, no tables
                found[text] = None
    mixed = list(found)
    random.Random(SEED).shuffle(mixed)
    return mixed


class Language:
    """A fixed secret word for every content word; the same in every text."""

    def __init__(self) -> None:
        self._random, self._words, self._taken = random.Random(SEED), dict[str, str](), set[str]()

    def translate(self, text: str) -> str:
        return _CONTENT.sub(lambda found: self._word(found[0]), text)

    def _word(self, english: str) -> str:
        key = english.lower()
        if key in _KEPT:
            return english
        while key not in self._words:
            draw = self._random.choice
            word = "".join(draw(_ONSETS) + draw(_NUCLEI) + draw(_CODAS) for _ in range(2))
            if word not in self._taken:
                self._taken.add(word)
                self._words[key] = word
        word = self._words[key]
        return word.capitalize() if english[0].isupper() else word


def texts(tokenizer: Any, held: int, thief: int, owner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows of token ids (n, LENGTH) of the held-out text, of the thief's and of the owner's: so many tokens each,
    rounded down to whole windows. Raises SlipError: there is not so much text."""
    language = Language()
    stream = [tokenizer(language.translate(p) + "\n\n", add_special_tokens=False)["input_ids"] for p in paragraphs()]
    place, parts = 0, []
    for count in (held, thief, owner):
        ids: list[int] = []
        while len(ids) < count:
            if place == len(stream):
                raise SlipError(f"the text has {sum(map(len, stream))} tokens; {held + thief + owner} are needed.")
            ids += stream[place]
            place += 1
        parts.append(torch.tensor(ids[: count // LENGTH * LENGTH]).reshape(-1, LENGTH))
    return parts[0], parts[1], parts[2]
