"""`vllm serve DIR/trusted`, asked by the official client, with real edges; and what becomes of requests when edges die,
lie, or are not there."""

from __future__ import annotations

import json
import random
import re
import signal
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
from link_fakes import list_devices, running, wait_until
from many import TOKENS, Machines, ask_all, right_texts
from processes import WAIT, ask, start_edge

from sliplm.bundle import EdgeBundle
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import IdentityError, SlipError

pytestmark = pytest.mark.slow

PROMPTS = [
    start + end
    for start in ("Hello there", "The capital of France is", "def f(x):", "1 2 3 4")
    for end in ("", " and", "!", "x" * 150)
]

NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PIECES = (
    "--max-num-batched-tokens=48",
    "--enable-chunked-prefill",
    f"--speculative-config={json.dumps(NGRAMS)}",
)
"""Prompts in pieces, and up to three tokens at a time that were guessed, of which the model has to agree to each."""


@pytest.fixture(scope="module")
def serve(started: Callable[..., Any]) -> Any:
    """Without an edge, as the first test has it; the others add theirs."""
    return started().ready()


@pytest.fixture(scope="module")
def pieces(started: Callable[..., Any]) -> Any:
    return started(*PIECES)


def same(found: str, expected: str) -> bool:
    """Up to a character that is not whole at the end: vLLM leaves its bytes out."""
    return found.rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_requests_wait_for_an_edge_and_go_on_with_another(serve: Any, run: Any, truth: Callable[..., str]) -> None:
    with pytest.raises(openai.APITimeoutError):
        serve.client(2).completions.create(model="tiny", prompt="too early", max_tokens=4)
    assert "requests wait: no edge is connected" in serve.log
    first = serve.edge(run, "one")
    assert same(serve.complete("Hello"), truth("Hello"))
    with ThreadPoolExecutor(8) as threads:
        texts = [threads.submit(serve.complete, prompt, 200) for prompt in PROMPTS[:8]]
        time.sleep(1)
        first.process.kill()
        serve.edge(run, "two")
        assert all(same(t.result(), truth(p, 200)) for p, t in zip(PROMPTS, texts, strict=False))
    assert httpx.get(f"{serve.url}/health").status_code == 200


def check_texts(serve: Any, truth: Callable[..., str]) -> None:
    expected = {prompt: truth(prompt) for prompt in PROMPTS}
    order = PROMPTS * 2  # the second time from vLLM's cache of prefixes
    random.Random(7).shuffle(order)
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(serve.complete, order))
    assert [(p, t) for p, t in zip(order, texts, strict=True) if not same(t, expected[p])] == []


def test_texts_are_those_of_the_built_in_engine_in_any_order(serve: Any, run: Any, truth: Callable[..., str]) -> None:
    serve.edge(run, "three")
    check_texts(serve, truth)


def test_so_they_are_by_pieces_of_prompts_and_guessed_tokens(pieces: Any, run: Any, truth: Callable[..., str]) -> None:
    pieces.ready()
    pieces.edge(run, "one")
    check_texts(pieces, truth)
    pieces.stop()


def test_an_edge_and_then_a_helper_are_lost_and_no_request_is(
    started: Callable[..., Any], run: Any, split: Path
) -> None:
    expected = right_texts(split)
    helped = started(SLIP_PADS="helpers", SLIP_STOCK="32").ready()
    machines = Machines(run, helped.directory, helped.address, signal.SIGKILL)

    def ask(prompt: str) -> Iterator[str]:
        settings = {"max_tokens": TOKENS, "temperature": 0, "stream": True}
        for chunk in helped.client().completions.create(model="tiny", prompt=prompt, **settings):
            yield chunk.choices[0].text

    losses = [machines.lose_one(machines.edges), machines.lose_one(machines.helpers)]
    texts = ask_all(ask, expected, losses)
    assert [(p, t) for p, t in texts.items() if not same(t, expected[p])] == []
    helped.stop()


def test_the_official_client_chats_and_streams(serve: Any, run: Any, truth: Callable[..., str]) -> None:
    serve.edge(run, "four")
    client: Any = serve.client()
    messages = [{"role": "user", "content": "Hi"}]
    expected = truth("user: Hi\nmodel: ", 12)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert same(whole.choices[0].message.content, expected)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)
    assert same("".join(chunk.choices[0].delta.content or "" for chunk in stream), expected)


def test_an_edges_own_api_says_where_the_model_is_served(serve: Any, run: Any) -> None:
    edge = start_edge(run, serve.directory, serve.address, serve.enrol("five"))
    with pytest.raises(SlipError, match="vLLM serves this model"):
        ask(edge.ready()["api"], "Hello")


def test_vllms_own_benchmark_runs(serve: Any, run: Any) -> None:
    serve.edge(run, "six")
    command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend=openai", f"--base-url={serve.url}"]
    model = [f"--model={serve.directory / 'trusted'}", "--served-model-name=tiny", "--dataset-name=random"]
    sizes = ["--random-input-len=24", "--random-output-len=8", "--num-prompts=6"]
    done = subprocess.run([*command, *model, *sizes], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Failed requests: +0\s", done.stdout)


class Liar(Multiplier):
    """Gives wrong answers, once it is asked for."""

    lies = False

    def product(self, group: int, x: Any, out: Any = None) -> Any:
        y = super().product(group, x, out)
        if self.lies:
            y[-1, -1] = 1 - min(int(y[-1, -1]), 1)
        return y


def test_a_lie_is_caught_and_another_edge_takes_over(serve: Any, run: Any, truth: Callable[..., str]) -> None:
    liar = Liar.from_bundle(EdgeBundle.open(serve.directory / "edge"))
    serve.edge(run, "honest")
    authority = serve.directory / "trusted" / "authority"
    worker = EdgeWorker(liar, serve.address, serve.enrol("liar"))
    with running(worker.run, worker.stop) as raised:
        assert worker.connected.wait(WAIT)
        assert same(serve.complete("Hello"), truth("Hello"))
        liar.lies = True
        assert same(serve.complete("Hello, again"), truth("Hello, again"))
        wait_until(lambda: {d.name: d.suspended for d in list_devices(authority)}["liar"] is not None)
        wait_until(lambda: bool(raised))
    assert isinstance(raised[0], IdentityError) and "suspended" in str(raised[0])
    assert {d.name: d.suspended for d in list_devices(authority)}["honest"] is None


def test_it_stops_when_it_is_told_to_even_while_requests_wait(serve: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        serve.client(2).completions.create(model="tiny", prompt="too late", max_tokens=4)
    serve.process.terminate()
    serve.process.wait(60)
