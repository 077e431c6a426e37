"""A client of an edge's API: what `slip generate`, `slip chat` and `slip demo` use."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from sliplm.errors import LinkError
from sliplm.protocol.messages import Chunk


def stream(
    api: str,
    prompt: str | Sequence[dict[str, str]],
    options: dict[str, Any],
    raw: bool = False,
    key: str | None = None,
    timeout: float = 300.0,
) -> Generator[Chunk, None, None]:
    """Stream the answer to `prompt` from the API at `api` (HOST:PORT, or a URL, with /v1 or without). Closing the
    iterator cancels.

    Args:
        prompt: what to say; or the messages of a chat, the last of which asks.
        options: further fields of the OpenAI request.
        raw: continue the text as it stands instead of answering a chat message.
        key: the API's key, if it has one.

    Raises:
        LinkError: nobody serves there, or the request was refused; the text says why.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    what = {"prompt": prompt} if raw else {"messages": messages}
    body = {"stream": True, "stream_options": {"include_usage": True}, **what, **options}
    base = _base(api)
    path = "/v1/completions" if raw else "/v1/chat/completions"
    usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
    text, finish = "", None
    with (
        _explained(api),
        _client(base, key, timeout) as client,
        client.stream("POST", base + path, json={"model": _model(client, base), **body}) as response,
    ):
        if response.status_code != 200:
            response.read()
            raise LinkError(_refusal(response))
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                raise LinkError(str(event["error"]["message"]))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                text = choice["text"] if raw else choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
                if text:
                    yield Chunk(text)
    if finish is None:
        raise LinkError("the API broke off in the middle of the answer.")
    details = usage.get("completion_tokens_details") or {}
    guessed = (details.get(f"{how}_prediction_tokens", 0) for how in ("accepted", "rejected"))
    yield Chunk("", finish, usage["prompt_tokens"], usage["completion_tokens"], [], [], *guessed)


def model(api: str, key: str | None = None) -> str:
    """The name of the model that the API at `api` serves. Raises LinkError."""
    base = _base(api)
    with _explained(api), _client(base, key, 10.0) as client:
        return _model(client, base)


def _base(api: str) -> str:
    """The URL before /v1: what the edge prints ends in it, and what a listening address looks like has no scheme."""
    return (api if "://" in api else f"http://{api}").rstrip("/").removesuffix("/v1")


def _client(base: str, key: str | None, timeout: float) -> httpx.Client:
    """Environment proxies must not see what goes to this machine's own edge. The system's certificates are read, which
    takes 20 ms of CPU, only where one will be checked."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Timeout(timeout, connect=5.0)
    return httpx.Client(timeout=limits, trust_env=False, headers=headers, verify=not base.startswith("http://"))


@contextmanager
def _explained(api: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LinkError(f"no answer from the API at {api} ({error}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # msgspec's and json's are ValueErrors
        raise LinkError(f"what answers at {api} is not an edge's API.") from None


def _model(client: httpx.Client, base: str) -> str:
    """The one model that the edge serves."""
    response = client.get(base + "/v1/models")
    if response.status_code != 200:
        raise LinkError(_refusal(response))
    return str(response.json()["data"][0]["id"])


def _refusal(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API refused with status {response.status_code}."
