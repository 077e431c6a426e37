"""A client of an edge's API: what `slip generate` and `slip demo` use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from sliplm.errors import LinkError
from sliplm.protocol.messages import Chunk


def stream(
    api: str, prompt: str, options: dict[str, Any], raw: bool = False, timeout: float = 300.0
) -> Iterator[Chunk]:
    """Stream the answer to `prompt` from the API at `api` (http://HOST:PORT).

    Args:
        options: further fields of the OpenAI request.
        raw: continue the text as it stands instead of answering a chat message.

    Raises:
        LinkError: nobody serves there, or the request was refused; the text says why.
    """
    what = {"prompt": prompt} if raw else {"messages": [{"role": "user", "content": prompt}]}
    body = {"stream": True, "stream_options": {"include_usage": True}, **what, **options}
    base = api.rstrip("/")
    path = "/v1/completions" if raw else "/v1/chat/completions"
    text, finish, usage = "", None, {"prompt_tokens": 0, "completion_tokens": 0}
    try:
        # Environment proxies must not see what goes to this machine's own edge.
        with (
            httpx.Client(timeout=httpx.Timeout(timeout, connect=5.0), trust_env=False) as client,
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
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LinkError(f"no answer from the API at {api} ({error}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # msgspec's and json's are ValueErrors
        raise LinkError(f"what answers at {api} is not an edge's API.") from None
    if finish is None:
        raise LinkError("the API broke off in the middle of the answer.")
    yield Chunk("", finish, usage["prompt_tokens"], usage["completion_tokens"])


def _model(client: httpx.Client, base: str) -> str:
    """The one model that the edge serves."""
    return str(client.get(base + "/v1/models").json()["data"][0]["id"])


def _refusal(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API refused with status {response.status_code}."
