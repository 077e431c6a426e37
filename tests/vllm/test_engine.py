"""`slip trusted --engine vllm`: the texts, limits and errors of the built-in engine, whoever computes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from many import Machines, ask_all, asked_by, right_texts
from processes import ask, eventually, start_edge

from sliplm.edge.side import Edge
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.vllm.engine import VllmEngine
from sliplm.errors import LinkError, RequestError, TooLongError, VerificationError
from sliplm.exchange.link import Link
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.registry import authority

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built_in(split: Path) -> BuiltinEngine:
    engine = BuiltinEngine(split / "trusted", allow_logprobs=True)
    engine.model.slip.attach(split / "edge")
    return engine


@pytest.fixture(scope="module")
def engine(split: Path) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        one = VllmEngine(split / "trusted", allow_logprobs=True)
    one.model.slip.attach(split / "edge")
    yield one
    one.close()


def answer(engine: BuiltinEngine, request: GenerateRequest, link: Link | None = None) -> list[Chunk]:
    return list(engine.generate(request, link or engine.model.slip.default_link))


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"]}

REQUESTS = [
    GenerateRequest(prompt=f"Request {number}", **{"max_tokens": 20, **options})
    for number, options in enumerate(
        [
            {},
            {"temperature": 0.8, "seed": 5},
            {"temperature": 1.3, "seed": 6, "top_p": 0.9, "top_k": 40},
            {"frequency_penalty": 1.5, "presence_penalty": 0.5},
            {"logprobs": 3},
            {"schema": SCHEMA, "max_tokens": 150},
            {"stop": ["a", "e", "\n"]},
            {"max_tokens": 1},
        ]
    )
]


def test_all_requests_at_once_in_any_order_are_answered_as_by_the_built_in_engine(
    engine: VllmEngine, built_in: BuiltinEngine
) -> None:
    expected = [answer(built_in, request) for request in REQUESTS]
    order = list(range(len(REQUESTS))) * 4
    random.Random(3).shuffle(order)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: answer(engine, REQUESTS[i]), order))
    for i, chunks in zip(order, found, strict=True):
        assert text(chunks) == text(expected[i])
        last, right = chunks[-1], expected[i][-1]
        assert (last.finish_reason, last.completion_tokens) == (right.finish_reason, right.completion_tokens)
        one, other = ([p for c in chunks for p in c.logprobs] for chunks in (chunks, expected[i]))
        assert [p.token for p in one] == [p.token for p in other]
        assert [p.logprob for p in one] == pytest.approx([p.logprob for p in other], abs=1e-3)
    schemas = [text(chunks) for i, chunks in zip(order, found, strict=True) if REQUESTS[i].schema]
    assert len(schemas) == 4 and all(json.loads(t)["n"] in range(100) for t in schemas)


def test_what_cannot_be_answered_is_refused_and_the_others_go_on(engine: VllmEngine) -> None:
    with pytest.raises(TooLongError):
        answer(engine, GenerateRequest(prompt="x" * 600))
    with pytest.raises(RequestError):
        answer(engine, GenerateRequest(prompt="Hello", schema={"type": "nonsense"}))
    assert answer(engine, REQUESTS[0])[-1].finish_reason == "length"


class Bad(Link):
    """An edge's link that fails as it is told to, from the exchange `after` on."""

    party = None

    def __init__(self, link: Link, error: Exception, after: int = 0) -> None:
        self._link, self._error, self._after = link, error, after

    def exchange(self, group: int, x: Any, own: Any) -> Any:
        self._after -= 1
        if self._after < 0:
            raise self._error
        return self._link.exchange(group, x, own)

    def close(self) -> None: ...


@pytest.mark.parametrize("error", [LinkError("gone"), VerificationError("a lie")])
def test_an_edge_that_fails_ends_its_own_requests_alone(
    engine: VllmEngine, built_in: BuiltinEngine, error: Exception
) -> None:
    good = engine.model.slip.default_link
    request = GenerateRequest(prompt="Hello", max_tokens=100)
    expected = text(answer(built_in, request))
    lost = engine.generate(request, Bad(good, error, 50))
    next(lost)  # its edge is the first that is asked
    next(lost)
    with ThreadPoolExecutor(4) as threads:
        kept = [threads.submit(answer, engine, request, good) for _ in range(2)]
        with pytest.raises(type(error)):
            list(lost)
        assert [text(future.result(60)) for future in kept] == [expected] * 2
    assert text(answer(engine, request)) == expected


def test_without_any_edge_requests_fail_and_later_ones_do_not(engine: VllmEngine) -> None:
    bad = Bad(engine.model.slip.default_link, LinkError("gone"))
    with pytest.raises(LinkError):
        answer(engine, GenerateRequest(prompt="Hello", max_tokens=5), bad)
    assert answer(engine, REQUESTS[0])[-1].completion_tokens == 20


def test_a_cancelled_request_makes_room(engine: VllmEngine) -> None:
    chunks = engine.generate(GenerateRequest(prompt="Hello", max_tokens=400), engine.model.slip.default_link)
    next(chunks), next(chunks)
    chunks.close()
    deadline = time.monotonic() + 30
    while engine._steps._inside or engine._steps._answers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_devices_and_processes(run: Any, bundle_of: Any) -> None:
    """Real ones: two devices with an edge each, eight requests at a time, and one edge is killed."""
    directory, identities = bundle_of
    trusted = run(
        "trusted", directory / "trusted", "--listen", "127.0.0.1:0", "--engine", "vllm", "--daily-tokens", "100000",
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    address = trusted.ready()["listening"]
    edges = [start_edge(run, directory, address, identity) for identity in identities]
    apis = [edge.ready()["api"] for edge in edges]
    expected = ask(apis[0], "Hello", max_tokens=30)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda i: ask(apis[i % 2], "Hello", max_tokens=30), range(8))) == {expected}
    begun = threading.Event()

    def long() -> str:
        begun.set()
        return ask(apis[1], "Hello", max_tokens=300)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(long)
        begun.wait()
        edges[0].process.kill()
        assert other.result(120).startswith(expected)
    assert eventually(lambda: ask(apis[1], "Hello", max_tokens=30)) == expected
    assert trusted.stop() == 0
    assert "Traceback" not in trusted.log


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_edge_and_then_a_helper_are_lost_and_no_request_is(
    run: Any, bundle_of: Any, split: Path, how: signal.Signals
) -> None:
    directory, (identity, _) = bundle_of
    trusted = run(
        "trusted", directory / "trusted", "--pads", "helpers", "--stock", "32", "--concurrent", "0", "--listen",
        "127.0.0.1:0", "--engine", "vllm", VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    address = trusted.ready()["listening"]
    machines = Machines(run, directory, address, how)
    expected = right_texts(split)
    losses = [machines.lose_one(machines.edges), machines.lose_one(machines.helpers)]
    assert ask_all(asked_by(Edge(directory / "edge", address, identity)), expected, losses) == expected
    assert trusted.stop() == 0
    assert "Traceback" not in trusted.log


@pytest.fixture
def bundle_of(split: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    directory = Path(shutil.copytree(split, tmp_path / "bundle"))
    identities = [tmp_path / f"{name}.identity" for name in ("one", "two")]
    for identity in identities:
        authority.add_device(directory / "trusted" / "authority", identity.stem, identity)
    return directory, identities
