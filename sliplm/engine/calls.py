"""Finds the calls in what a model writes, while it writes.

The rest is text. What only looks like a call (an unknown function, another notation) is text too. A call counts from
the beginning of its arguments, which then go out as they come, so an answer that is cut may have a call that is cut.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Generator, Iterator

import msgspec

from sliplm.engine.tools import Syntax
from sliplm.protocol.messages import CallPiece, Chunk

_NAME = r"([a-zA-Z0-9_-]{1,64})"
_SPACE = r"\s{0,16}"
_MEMBERS = rf'(?:,{_SPACE}"\w{{1,16}}"{_SPACE}:{_SPACE}(?:"[^"]{{0,64}}"|\w{{1,16}}){_SPACE}){{0,4}}'
"""What models add to the object of a call after its arguments, like an id."""

_LONGEST = 4096
"""Characters after which what has not become a call is none; no expression here matches more."""


class Calls:
    """Splits text, however it comes in pieces. Give every piece to `push`, the last one with `finished`.

    Attributes:
        count: calls so far.
    """

    def __init__(self, syntax: Syntax, names: Collection[str], parallel: bool = True) -> None:
        """Only `names` can be called, and without `parallel` only once: later calls are left out."""
        self.count = 0
        self._names, self._parallel = names, parallel
        self._marker, self._json = syntax.marker, "{" in syntax.head
        name = _NAME + _loosely(syntax.mid) + _SPACE + r"(?=\{)"
        members = _MEMBERS if self._json else ""
        self._begin = re.compile(_loosely(syntax.head.strip()) + name)
        self._next: re.Pattern[str] | None = None  # a second call without a marker of its own
        if syntax.joint is not None and not (self._marker and self._marker in syntax.joint):
            self._next = re.compile(members + _loosely(syntax.joint.strip()) + name)
        closing = syntax.tail.lstrip("}] \t\n")
        self._tail = re.compile(members + _loosely(syntax.tail.strip())), syntax.tail
        self._closing = re.compile(_loosely(closing.strip())), closing
        self._ending = self._tail
        self._buffer, self._state = "", self._at_start
        self._text, self._pieces = "", list[CallPiece]()

    def push(self, text: str, finished: bool = False) -> tuple[str, list[CallPiece]]:
        """What is certainly text, and pieces of calls."""
        self._buffer += text
        self._text, self._pieces = "", []
        while self._state(finished):
            pass
        return self._text, self._pieces

    # Each state takes what it can from the buffer, and tells whether another one shall look at the rest.

    def _at_start(self, finished: bool) -> bool:
        """Before any text, the only place for a call without a marker."""
        begun = self._buffer.lstrip()
        if not self._marker and not begun and not finished:
            return False
        self._state = self._in_text
        if not self._marker and begun.startswith(("{", "[")):
            self._state = self._at_call
        return True

    def _in_text(self, finished: bool) -> bool:
        text = self._buffer
        if self._marker and self._marker in text:
            said = text.partition(self._marker)[0].rstrip()
            self._buffer, self._state = self._buffer[len(said) :], self._at_call
            self._text += said
            return True
        certain = len(text) if finished and not self.count else self._certain(text, finished)
        self._text, self._buffer = self._text + text[:certain], text[certain:]
        return False

    def _certain(self, text: str, finished: bool) -> int:
        """So many characters of `text` are neither the beginning of a marker nor space around calls."""
        longest = range(0 if finished else min(len(self._marker) - 1, len(text)), 0, -1)
        partial = next((n for n in longest if self._marker.startswith(text[-n:])), 0)
        return len(text[: len(text) - partial].rstrip()) if self._marker or self.count else len(text)

    def _at_call(self, finished: bool) -> bool:
        buffer = self._buffer.lstrip()
        if (found := self._begin.match(buffer)) and found[1] in self._names:
            self._open(found[1], buffer[found.end() :])
            return True
        rest = buffer[len(self._marker) :].lstrip()
        if self._json and rest and not found:
            if rest[0] in "{[" and (end := _Value().end(rest[:_LONGEST])) is not None:
                return self._whole(rest[:end], rest[end:]) or self._no_call()
            if rest[0] not in "{[":
                return self._no_call()
        return (bool(found) or finished or len(rest) > _LONGEST) and self._no_call()

    def _no_call(self) -> bool:
        """It is text after all, and a call may still come after it."""
        end = self._buffer.find(self._marker) + len(self._marker)
        self._text += self._buffer[:end]
        self._buffer, self._state = self._buffer[end:], self._in_text
        return True

    def _whole(self, value: str, rest: str) -> bool:
        """Whether a JSON value is a call, or a list of them, with its members in another order than the template's."""
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return False
        found = [c if isinstance(c, dict) else {} for c in (found if isinstance(found, list) else [found])]
        calls = [(c.get("name"), c.get("arguments", c.get("parameters"))) for c in found]
        if not calls or not all(isinstance(n, str) and n in self._names and isinstance(a, dict) for n, a in calls):
            return False
        for name, arguments in calls:
            self._open(name, "")
            self._argue(json.dumps(arguments, ensure_ascii=False))
        self._buffer, self._state, self._ending = rest, self._after_call, self._closing
        return True

    def _open(self, name: str, rest: str) -> None:
        self.count += 1
        self._state, self._value, self._buffer = self._in_arguments, _Value(), rest
        if self._wanted():
            id = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))  # as Mistral's demands
            self._pieces.append(CallPiece(self.count - 1, id, name))

    def _argue(self, text: str) -> None:
        if text and self._wanted():
            self._pieces.append(CallPiece(self.count - 1, arguments=text))

    def _wanted(self) -> bool:
        return self._parallel or self.count == 1

    def _in_arguments(self, finished: bool) -> bool:
        end = self._value.end(self._buffer)
        self._argue(self._buffer[:end])
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state, self._ending = self._after_call, self._tail
        return end is not None

    def _after_call(self, finished: bool) -> bool:
        rest = self._buffer.lstrip()
        if self._next and self._ending is self._tail and (found := self._next.match(rest)) and found[1] in self._names:
            self._open(found[1], rest[found.end() :])
            return True
        pattern, text = self._ending
        if found := pattern.match(rest):
            self._buffer = rest[found.end() :]
        elif finished and _squeezed(text).startswith(_squeezed(rest)):
            self._buffer = ""
        elif not finished and len(rest) <= _LONGEST:
            return False
        self._state = self._in_text
        return True


class _Value:
    """Finds the end of a JSON object or list that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def end(self, piece: str) -> int | None:
        """How much of the next piece belongs to the value, or None if all does and more is to come."""
        for at, c in enumerate(piece):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._quoted = False
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def find_calls(chunks: Iterator[Chunk], calls: Calls) -> Generator[Chunk, None, None]:
    """`chunks`, the calls in their text taken out of it."""
    for chunk in chunks:
        finish = chunk.finish_reason
        text, pieces = calls.push(chunk.text, finish is not None)
        if finish == "stop" and calls.count:
            finish = "tool_calls"
        yield msgspec.structs.replace(chunk, text=text, calls=pieces, finish_reason=finish)


def _loosely(text: str) -> str:
    """An expression for `text` whose spaces may be others."""
    return _SPACE.join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", text))


def _squeezed(text: str) -> str:
    return "".join(text.split())
