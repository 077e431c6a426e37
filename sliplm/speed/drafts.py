"""What guessing tokens is worth: answers over TLS with and without drafts, by turns, on texts that repeat their prompt
and on texts that do not.

Everything is what a user has: an engine and its server, a real `slip edge` in another process, its API. Pads are made
beforehand.
"""

from __future__ import annotations

import pydoc_data.topics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sliplm.edge.client import stream
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.drafting import LOOKUP, NONE
from sliplm.planner.costs import Network
from sliplm.planner.network import emulated
from sliplm.processes import process
from sliplm.protocol.messages import Message
from sliplm.registry import authority
from sliplm.serve.server import TrustedServer

CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    if shape.kind == "square":
        return shape.side ** 2
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError("unknown shape: " + shape.kind)
"""

ASKED = {
    "code edit": f"Rename the function area to surface in this Python code, and print all of it again:\n\n{CODE}",
    "summary": f"Summarize this text:\n\n{pydoc_data.topics.topics['for'][:1200]}",
    "story": "Write a short story about a lighthouse keeper.",
    "explanation": "Explain how vaccines work.",
}

ROOM = 16
"""Pads beyond an answer's own, in tokens."""


class _Answer(NamedTuple):
    text: str
    tokens: int
    accepted: int
    rejected: int
    seconds: float  # from its first piece to its end


class _Side(NamedTuple):
    engine: BuiltinEngine
    api: str


def measure(
    directory: Path, tokens: int, rounds: int, network: Network, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """For each of the texts, answers of up to `tokens` tokens, `rounds` times, over `network`. Raises SlipError: the
    model has no tokenizer, or a process fails."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="slip-bench-") as scratch:
        home = Path(scratch)
        with (
            _side(directory, home / NONE, NONE, network) as without,
            _side(directory, home / LOOKUP, LOOKUP, network) as drafting,
        ):
            for side in (without, drafting):
                _ask(side, "Hello", 4)  # warms up
            for name, prompt in ASKED.items():
                plain, drafted = [], []
                for _ in range(rounds):
                    plain.append(_ask(without, prompt, tokens))
                    drafted.append(_ask(drafting, prompt, tokens))
                rows.append(_row(name, plain, drafted))
                say(f"  {name}: {rows[-1]['tokens_per_pass']:.2f} tokens a pass")
    return rows


def _row(name: str, plain: list[_Answer], drafted: list[_Answer]) -> dict[str, Any]:
    tokens, accepted, rejected = (sum(getattr(a, what) for a in drafted) for what in ("tokens", "accepted", "rejected"))
    each = [median(a.seconds / max(1, a.tokens - 1) for a in answers) for answers in (plain, drafted)]
    return {
        "text": name,
        "tokens_per_pass": tokens / max(1, tokens - accepted),
        "rejected_per_token": rejected / max(1, tokens),
        "ms_without": 1e3 * each[0],
        "ms_with": 1e3 * each[1],
        "same": len({answer.text for answer in plain + drafted}) == 1,
    }


@contextmanager
def _side(directory: Path, home: Path, drafts: str, network: Network) -> Iterator[_Side]:
    """An engine that is served in this process, and an edge, over `network`, in another."""
    engine = BuiltinEngine(directory / "trusted", drafts=drafts)
    engine.model.slip.attach(directory / "edge")
    authority.add_device(home / "authority", "bench", home / "identity", days=1)
    server = TrustedServer(engine, engine.digest, engine.shapes, home / "authority")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with (
            emulated("{}:{}".format(*server.address), network) as where,
            process(
                "edge", directory / "edge", "--trusted", where, "--identity", home / "identity", "--api", "127.0.0.1:0"
            ) as edge,
        ):
            engine.model.slip.pool.start()
            yield _Side(engine, edge["api"])
    finally:
        server.close()
        engine.model.slip.pool.close()
        engine.close()


def _ask(side: _Side, prompt: str, tokens: int) -> _Answer:
    pool = side.engine.model.slip.pool
    pool.resize(len(side.engine.chat.tokens([Message("user", prompt)])) + 3 * tokens + ROOM)
    pool.wait(pool.depth)
    pool.resize(0)
    text, first, last = "", 0.0, None
    for last in stream(side.api, prompt, {"max_tokens": tokens, "temperature": 0}):
        first = first or time.perf_counter()
        text += last.text
    assert last is not None  # the stream raises rather than end early
    seconds = time.perf_counter() - first
    return _Answer(text, last.completion_tokens, last.accepted_tokens, last.rejected_tokens, seconds)
