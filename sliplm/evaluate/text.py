"""English text to measure on: a file, or the documentation that every Python carries."""

from __future__ import annotations

import re
from pathlib import Path

from sliplm.errors import SlipError


def read_text(path: Path | None) -> str:
    """The contents of `path`, or the prose of the standard library's `pydoc_data.topics`. Raises SlipError."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlipError(f"cannot read {path} as UTF-8 text ({error}).") from None


def prompts(text: str, count: int) -> list[str]:
    """`count` sentences of 40 to 200 characters, spread evenly over `text`. Raises SlipError if it has fewer."""
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [s for s in dict.fromkeys(sentences) if 40 <= len(s) <= 200 and s[0].isupper()]
    if len(sentences) < count:
        raise SlipError(f"the text has only {len(sentences)} usable sentences; {count} are needed.")
    return [sentences[i * len(sentences) // count] for i in range(count)]
