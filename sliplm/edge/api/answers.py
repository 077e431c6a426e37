"""What clients get: the JSON of whole answers and of streamed pieces, as each endpoint words it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sliplm.edge.api.tools import made, pieces
from sliplm.protocol.messages import CallPiece, Chunk, TokenLogprob


class Answer:
    """The JSON of one HTTP request's answer. `prompts` prompts have the same number of `choices` each."""

    def __init__(self, chat: bool, model: str, choices: int, prompts: int, with_usage: bool) -> None:
        self._chat, self._with_usage = chat, with_usage
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._per_prompt = choices // prompts
        self._begun = [False] * choices
        self._offsets = [0] * choices

    def whole(
        self,
        texts: Sequence[str],
        logprobs: Sequence[list[TokenLogprob]],
        calls: Sequence[list[CallPiece]],
        last: Sequence[Chunk],
    ) -> Any:
        """The answer at once: everything by choice."""
        choices = []
        for i, text in enumerate(texts):
            said: dict[str, Any] = {"text": text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
                if calls[i]:
                    said["message"] |= {"content": text or None, "tool_calls": made(calls[i])}
            choices.append(self._choice(i, said, logprobs[i], last[i].finish_reason))
        return {**self._head, "choices": choices, "usage": self.usage(last)}

    def piece(self, choice: int, chunk: Chunk) -> Any:
        """The next event of one choice."""
        said: dict[str, Any] = {"text": chunk.text}
        if self._chat:
            role = {} if self._begun[choice] else {"role": "assistant"}
            said = {"delta": {**role, "content": chunk.text}}
            if chunk.calls:
                said = {"delta": {**role, "content": chunk.text or None, "tool_calls": pieces(chunk.calls)}}
        self._begun[choice] = True
        event = self._event([self._choice(choice, said, chunk.logprobs, chunk.finish_reason)])
        return {**event, "usage": None} if self._with_usage else event

    def last_piece(self, last: Sequence[Chunk]) -> Any | None:
        """The event with the totals, if it was asked for."""
        return {**self._event([]), "usage": self.usage(last)} if self._with_usage else None

    def usage(self, last: Sequence[Chunk]) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, however many choices it has. Tokens that the trusted side
        guessed have the names that OpenAI's API has for predicted ones."""
        prompt = sum(chunk.prompt_tokens for chunk in last[:: self._per_prompt])
        completion = sum(chunk.completion_tokens for chunk in last)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        accepted, rejected = (sum(getattr(c, f"{how}_tokens") for c in last) for how in ("accepted", "rejected"))
        if accepted or rejected:
            details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
            return usage | {"completion_tokens_details": details}
        return usage

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(
        self, index: int, said: dict[str, Any], logprobs: list[TokenLogprob], finish_reason: str | None
    ) -> dict[str, Any]:
        worded = None
        if logprobs:
            worded = _chat_logprobs(logprobs) if self._chat else self._plain_logprobs(index, logprobs)
        return {"index": index, **said, "logprobs": worded, "finish_reason": finish_reason}

    def _plain_logprobs(self, choice: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """`text_offset` counts characters of the tokens from the beginning of the answer."""
        ends = list(itertools.accumulate((len(p.token) for p in logprobs), initial=self._offsets[choice]))
        self._offsets[choice] = ends[-1]
        return {
            "tokens": [p.token for p in logprobs],
            "token_logprobs": [p.logprob for p in logprobs],
            "top_logprobs": [_likeliest(p.top) for p in logprobs] if logprobs[0].top else None,
            "text_offset": ends[:-1],
        }


def _chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    content = [
        {**_token(p.token, p.logprob), "top_logprobs": [_token(token, logprob) for token, logprob in p.top]}
        for p in logprobs
    ]
    return {"content": content, "refusal": None}


def _likeliest(top: list[tuple[str, float]]) -> dict[str, float]:
    """By text: of tokens with the same one, which are parts of characters, the likeliest."""
    return dict(reversed(dict(reversed(top)).items()))


def _token(token: str, logprob: float) -> dict[str, Any]:
    """A part of a character is U+FFFD, whose own bytes would mislead."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}
