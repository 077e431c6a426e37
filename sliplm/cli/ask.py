"""`slip generate`: ask through an edge's API."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sliplm.cli.common import Api, ApiKey, Json, emit, printable, read_api_key
from sliplm.errors import LinkError


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    api: Api = "http://127.0.0.1:8411",
    raw: Annotated[bool, typer.Option(help="Continue the text as it stands, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Ask through an edge's API and stream the answer."""
    from sliplm.edge.client import stream

    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop or []}
    body |= {k: v for k, v in {"top_p": top_p, "seed": seed}.items() if v is not None}
    text, last = "", None
    for event in stream(api, prompt, body, raw, read_api_key(api_key)):
        text += event.text
        last = event
        if not as_json:
            print(printable(event.text, sys.stdout.isatty()), end="", flush=True)
    if last is None:
        raise LinkError("the API ended the answer before it began.")
    if as_json:
        usage = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
        emit(True, {"text": text, "finish_reason": last.finish_reason, "usage": usage}, "")
    else:
        print(flush=True)
