"""`vllm serve DIR/trusted`, asked by the official client, with real edges; and what becomes of requests when edges die,
lie, or are not there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from link_fakes import list_devices, wait_until, working
from processes import Process, ask

from sliplm.bundle import EdgeBundle
from sliplm.edge.multiplier import Multiplier
from sliplm.errors import SlipError

pytestmark = pytest.mark.slow

PROMPTS = [
    start + end
    for start in ("Hello there", "The capital of France is", "def f(x):", "1 2 3 4")
    for end in ("", " and", "!", "x" * 150)
]

WAYS = {
    "plain": (),
    # Prompts in pieces, and up to three tokens a step, of which the model has to agree to each.
    "chunks and n-grams": (
        "--max-num-batched-tokens", "48", "--enable-chunked-prefill", "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}',
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(WAYS))
def serve(request: pytest.FixtureRequest, started: Callable[..., Any]) -> Iterator[Any]:
    """With one edge."""
    one = started(*WAYS[request.param])
    edge = Process(
        "edge", one.directory / "edge", "--trusted", one.address, "--api", "127.0.0.1:0",
        "--identity", one.identities / "first.identity",
    )  # fmt: skip
    one.api = edge.ready()["api"]
    yield one.ready()
    edge.process.kill()
    one.stop()
    assert "EngineDeadError" not in one.log


def same(found: str, expected: str) -> bool:
    """Up to a character that is not whole at the end: vLLM leaves its bytes out."""
    return found.rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_texts_are_those_of_the_built_in_engine_in_any_order(serve: Any, truth: Callable[..., str]) -> None:
    expected = {prompt: truth(prompt) for prompt in PROMPTS}
    order = PROMPTS * 2  # the second time from vLLM's cache of prefixes
    random.Random(7).shuffle(order)
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(serve.complete, order))
    assert [(p, t) for p, t in zip(order, texts, strict=True) if not same(t, expected[p])] == []


def test_the_official_client_chats_and_streams(serve: Any, truth: Callable[..., str]) -> None:
    client: Any = serve.client()
    messages = [{"role": "user", "content": "Hi"}]
    expected = truth("user: Hi\nmodel: ", 12)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert same(whole.choices[0].message.content or "", expected)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)
    assert same("".join(chunk.choices[0].delta.content or "" for chunk in stream), expected)


def test_an_edges_own_api_says_where_the_model_is_served(serve: Any) -> None:
    with pytest.raises(SlipError, match="vLLM serves this model"):
        ask(serve.api, "Hello")


def test_vllms_own_benchmark_runs(serve: Any) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "openai", "--base-url", serve.url,
         "--model", serve.directory / "trusted", "--served-model-name", "tiny", "--dataset-name", "random",
         "--random-input-len", "24", "--random-output-len", "8", "--num-prompts", "6"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Failed requests:                         0" in done.stdout


@pytest.fixture(scope="module")
def lonely(started: Callable[..., Any]) -> Any:
    """Without an edge."""
    return started().ready()


def test_requests_wait_for_an_edge_and_go_on_with_another(lonely: Any, run: Any, truth: Callable[..., str]) -> None:
    with pytest.raises(openai.APITimeoutError):
        lonely.client(2).completions.create(model="tiny", prompt="too early", max_tokens=4)
    assert "requests wait: no edge is connected" in lonely.log
    first = lonely.edge(run, "one")
    assert same(lonely.complete("Hello"), truth("Hello"))
    with ThreadPoolExecutor(8) as threads:
        texts = [threads.submit(lonely.complete, prompt, 200) for prompt in PROMPTS[:8]]
        time.sleep(1)
        first.process.kill()
        lonely.edge(run, "two")
        assert all(same(t.result(), truth(p, 200)) for p, t in zip(PROMPTS, texts, strict=False))
    assert httpx.get(f"{lonely.url}/health").status_code == 200


class Liar(Multiplier):
    """Gives a wrong answer, once it is asked for."""

    lies = False

    def product(self, group: int, x: Any, out: Any = None) -> Any:
        y = super().product(group, x, out)
        if self.lies:
            y[-1, -1] = 1 - min(int(y[-1, -1]), 1)
        return y


def test_a_lie_is_caught_and_another_edge_takes_over(lonely: Any, run: Any, truth: Callable[..., str]) -> None:
    liar = Liar.from_bundle(EdgeBundle.open(lonely.directory / "edge"))
    lonely.edge(run, "honest")
    host, _, port = lonely.address.partition(":")
    with working((host, int(port)), lonely.enrol("liar"), liar):
        assert same(lonely.complete("Hello"), truth("Hello"))
        liar.lies = True
        assert same(lonely.complete("Hello, again"), truth("Hello, again"))

        def states() -> dict[str, str]:
            return {d.name: d.status for d in list_devices(lonely.directory / "trusted" / "authority")}

        wait_until(lambda: states()["liar"] == "suspended")
        assert states()["honest"] == "active"
