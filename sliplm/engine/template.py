"""The model's chat template: a program of its author's, so it is tried at start on what it will be asked."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import jinja2

from sliplm.engine.tools import described, worded
from sliplm.errors import RequestError
from sliplm.protocol.messages import Message, Tool

_USER, _ASSISTANT = "Question-4711", "Answer-4711"
"""No template has these words by itself."""


class Chat:
    """Chats as prompts.

    Attributes:
        refusal: why this model takes no chats, in words for the owner; None if it does.
        wants_system: whether a chat has to begin with a system message.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """`vocabulary` is the number of the model's embeddings: there are tokenizers with more tokens."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._in_parts = self.wants_system = False
        self.refusal = self._fault()
        for kind in ((False, True), (True, False), (True, True)):
            if self.refusal is None:
                break
            self._in_parts, self.wants_system = kind
            if self._fault() is None:
                self.refusal = None

    def tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """What the model is run on. Raises RequestError, also if the template would leave out a system message."""
        if self.refusal is not None:
            raise RequestError("this model takes no chats, only plain prompts: it has no chat template that works.")
        if self.wants_system and messages[0].role != "system":
            raise RequestError("this model's chat template wants a system message at the beginning.")
        tokens = self._encode(self._prompt(messages, tools))
        if not tokens:
            raise RequestError("the model's chat template makes nothing of these messages.")
        return tokens

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """A system message may be the owner's. Some templates have no system role; others forget it where there are
        tools, or where the last turn is not the user's: then it becomes the first lines of the user's turn."""
        system = [_squeezed(m.content) for m in messages if m.role == "system"]
        # A text that is there may be another turn's, which quotes it. Nobody can quote these.
        marks = [Message("system", secrets.token_hex(16)) if m.role == "system" else m for m in messages]
        refused = RequestError("the model's chat template leaves out a system message.")
        for arrange in (list, _fold) if messages[0].role == "system" else (list,):
            try:
                text = self._asked(arrange(messages), tools)
                whole = not system or all(words in _squeezed(text) for words in system)
                marked = self._asked(arrange(marks), tools) if system and whole else ""
                if whole and all(m.content in marked for m in marks if m.role == "system"):
                    return text
            except RequestError as error:
                refused = error
        raise refused

    def _asked(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        worded(messages)  # what it refuses is not the template's fault
        try:
            return self._render(messages, tools)
        except Exception as error:  # templates raise what they like
            # Only a template's own `raise_exception` speaks to users; other texts may quote the trusted side.
            why = f" ({error})" if type(error) is jinja2.TemplateError else ""
            raise RequestError(f"the model's chat template refuses these messages{why}.") from None

    def example(self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompting: bool = False) -> str:
        """What the template makes of an example, which begins with a system message if it has to; `prompting` for an
        answer. Raises what it likes."""
        opening = [Message("system", "s")] if self.wants_system else []
        return self._render([*opening, *messages], tools, prompting)

    def end_of_turn(self) -> int | None:
        """The token with which the template ends an answer, if it is one."""
        question, answer = Message("user", _USER), Message("assistant", _ASSISTANT)
        # Some templates end an answer only where another turn follows; others end it in another way there.
        for turns in ([question, answer], [question, answer, question]):
            try:
                after = self.example(turns).rpartition(_ASSISTANT)[2]
            except Exception:  # templates raise what they like
                return None
            for token in self._encode(after):
                if token in self._tokenizer.added_tokens_decoder and self._tokenizer.decode([token]).strip():
                    return int(token)
                if self._tokenizer.decode([token]).strip():
                    return None  # words end a turn
        return None

    def _fault(self) -> str | None:
        if not self._tokenizer.chat_template:
            return "it has no chat template"
        try:
            text = self.example([Message("user", _USER)], prompting=True)
        except Exception as error:  # templates raise what they like
            first = str(error).strip().partition("\n")[0]
            return f"its chat template does not work ({type(error).__name__}: {first})"
        if not text.strip():
            return "its chat template renders nothing"
        if _USER not in text:
            return "its chat template leaves out what the user says"
        if strange := unknown_token(self._tokenizer, self._encode(text), self._vocabulary):
            return f"its chat template writes the token {strange}, which the model does not have"
        return None

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompting: bool = True) -> str:
        chat = worded(messages)
        if self._in_parts:  # as templates of models that see pictures may want it
            chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
        text: str = self._tokenizer.apply_chat_template(
            chat, tools=described(tools), add_generation_prompt=prompting, tokenize=False
        )
        return text


def unknown_token(tokenizer: Any, tokens: Sequence[int], vocabulary: int) -> str | None:
    """The text of the first token that a model of so many embeddings does not have."""
    token = next((t for t in tokens if t >= vocabulary), None)
    return None if token is None else str(tokenizer.convert_ids_to_tokens(token))


def _fold(messages: Sequence[Message]) -> list[Message]:
    """`messages` with the system message at their beginning as the first lines of the user's first turn."""
    first, *rest = messages
    if rest and rest[0].role == "user":
        return [Message("user", f"{first.content}\n\n{rest[0].content}"), *rest[1:]]
    return [Message("user", first.content), *rest]


def _squeezed(text: str) -> str:
    """`text` without its spaces, of which templates take some away."""
    return "".join(text.split())
