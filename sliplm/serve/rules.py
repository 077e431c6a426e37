"""The owner's rules: code of the model's owner that sees every request and every answer, on the trusted side, where the
customer cannot take it out.

Rules are any class with the methods of `Rules`, named as `module:object` or installed under the entry point group
`sliplm.rules`. Whatever else than Refused they raise ends the request too: rules that fail let nothing pass.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sliplm.errors import RefusedError, RequestError, RulesError, locate
from sliplm.protocol.messages import Chunk, GenerateRequest, Message

GROUP = "sliplm.rules"

Refused = RefusedError


class Rules(Protocol):
    """What the owner may decide. Called from many threads. The base class lets everything pass."""

    def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
        """The request to run in place of `request`, which the device of this name sent, or the same one. Raises
        Refused, whose sentence the customer sees."""
        return request

    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        """How much of the answer may be shown, and how: called whenever there is more of it.

        `text` is the answer so far, from its beginning, as the model wrote it. What is returned begins with what was
        returned before, since the customer has that; it may end earlier than `text`, to decide later, or say something
        else. With `finished` it is the whole answer, which the customer may have ended anywhere: `max_tokens` and stop
        texts count on the model's text. Raises Refused; what was shown before stays shown.
        """
        return text


class SystemPrompt(Rules):
    """Begins every chat with the owner's `text`, before a system message of the customer's, and lets `then` decide
    first. Refuses prompts that are no chat, since those would pass it by."""

    def __init__(self, text: str, then: Rules | None = None) -> None:
        self.text = text
        self._rules = then

    def request(self, request: GenerateRequest, device: str) -> GenerateRequest:
        if self._rules is not None:
            request = self._rules.request(request, device)
        if request.messages is None:
            raise RequestError("this model takes chat messages only, not a plain prompt")
        first, *rest = request.messages
        if first.role == "system":  # many templates take one system message, at the beginning
            messages = [Message("system", f"{self.text}\n\n{first.content}"), *rest]
        else:
            messages = [Message("system", self.text), first, *rest]
        return msgspec.structs.replace(request, messages=messages)

    def response(self, request: GenerateRequest, device: str, text: str, finished: bool) -> str:
        return text if self._rules is None else self._rules.response(request, device, text, finished)


def load(name: str) -> Rules:
    """The rules at `module:object`, from the working directory or installed, or under that name in the entry point
    group. A class is instantiated. Raises RulesError."""
    try:
        if ":" in name:
            module, _, attribute = name.partition(":")
            if "" not in sys.path:
                sys.path.insert(0, "")
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        else:
            (entry,) = importlib.metadata.entry_points(group=GROUP, name=name)
            found = entry.load()
        rules: Any = found() if inspect.isclass(found) else found
    except Exception as error:
        raise RulesError(f"the rules {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not all(callable(getattr(rules, method, None)) for method in ("request", "response")):
        raise RulesError(f"the rules {name!r} lack a method `request` or `response`")
    checked: Rules = rules
    return checked


def compose(rules: str | None, system_prompt: Path | None) -> Rules | None:
    """What the command line names, or None if it names nothing. Raises RulesError."""
    chosen = load(rules) if rules else None
    if system_prompt is None:
        return chosen
    try:
        text = system_prompt.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RulesError(f"the system prompt {system_prompt} cannot be read: {why}") from None
    if not text:
        raise RulesError(f"the system prompt {system_prompt} is empty")
    return SystemPrompt(text, chosen)


def edits(rules: Rules) -> bool:
    """Whether these rules look at answers. All do whose `response` is not plainly the one that lets everything pass."""
    bound: Any = rules.response  # the object's own, which need not be its class's
    function = getattr(bound, "__func__", None)
    if function is SystemPrompt.response:
        inner = bound.__self__._rules
        return inner is not None and edits(inner)
    return function is not Rules.response


def review_request(rules: Rules | None, request: GenerateRequest, device: str) -> GenerateRequest:
    """The request to run. Raises Refused or RequestError as the rules do, RulesError for whatever else they raise."""
    if rules is None:
        return request
    with _failing_closed():
        reviewed = rules.request(request, device)
        if not isinstance(reviewed, GenerateRequest):
            raise TypeError
    if reviewed.logprobs is not None and edits(rules):
        # They list the tokens as the model chose them, so they would show what the rules hold back.
        raise RequestError("logprobs are not available from this model: its owner's rules review answers")
    return reviewed


def review_answer(
    rules: Rules | None, chunks: Iterator[Chunk], request: GenerateRequest, device: str
) -> Generator[Chunk, None, None]:
    """`chunks` with the text that the rules release. Raises as `review_request`."""
    if rules is None or not edits(rules):
        yield from chunks
        return
    text = shown = ""
    for chunk in chunks:
        finished = chunk.finish_reason is not None
        text += chunk.text
        released = shown
        if chunk.text or finished:
            with _failing_closed():
                released = rules.response(request, device, text, finished)
                if not isinstance(released, str) or not released.startswith(shown):
                    raise TypeError  # what has been shown cannot be taken back
        yield msgspec.structs.replace(chunk, text=released[len(shown) :])
        shown = released


@contextlib.contextmanager
def _failing_closed() -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # its text might quote a prompt
        raise RulesError(f"the owner's rules failed: {locate(error)}") from None
