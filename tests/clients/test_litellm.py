"""LiteLLM, which hands an answer back with keys of its own, and chooses its fallbacks by the words of an error."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from conftest import CAPITAL, Server


def ask(server: Server, **more: Any) -> Any:
    return litellm.completion(
        **{
            "model": f"openai/{server.model}", "api_base": server.url, "api_key": server.key, "messages": CAPITAL,
            "temperature": 0, "max_tokens": 8, "num_retries": 0, **more,
        }
    )  # fmt: skip


def test_two_turns(server: Server) -> None:
    said = ask(server).choices[0].message
    assert "Paris" in said.content
    kept = {**said.model_dump(), "reasoning_content": "hm", "thinking_blocks": [{"type": "thinking", "thinking": "hm"}]}
    assert "provider_specific_fields" in kept
    for turn in (said, kept):
        again = ask(server, messages=[*CAPITAL, turn, {"role": "user", "content": "And of Italy?"}])
        assert again.choices[0].message.content
    pieces = [e.choices[0].delta.content or "" for e in ask(server, stream=True)]
    assert "".join(pieces) == said.content


def test_a_prompt_that_is_too_long(server: Server, too_long: list[dict[str, str]]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="8192"):
        ask(server, messages=too_long)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(server, messages=too_long, stream=True)
    small = {"model": f"openai/{server.model}", "api_base": server.url, "api_key": server.key}
    router = litellm.Router(
        model_list=[
            {"model_name": "small", "litellm_params": small},
            {"model_name": "large", "litellm_params": {"model": "openai/large", "mock_response": "from another"}},
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    assert router.completion("small", messages=too_long).choices[0].message.content == "from another"
