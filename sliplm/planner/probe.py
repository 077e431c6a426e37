"""Measure, in some ten seconds, how fast this machine would be as the trusted side and as the edge.

The kernels are those that both sides compute with, on matrices that no cache holds. Two small models, of few blocks and
of more, decode over TLS with a real edge: what a block more takes beyond what `planner.costs` says of its arithmetic is
what exchanges take besides.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from sliplm import kernels
from sliplm._core import native
from sliplm.edge.multiplier import Multiplier
from sliplm.errors import SlipError
from sliplm.exchange import masking
from sliplm.exchange.check import CHECKS
from sliplm.exchange.operator import ROWS, Operator
from sliplm.planner.costs import FLOAT, Network, Split, masked
from sliplm.planner.shapes import of_llama_layout
from sliplm.planner.speeds import Edge, Plain, Speeds, Trusted
from sliplm.prg import expand, fresh_key, uniform
from sliplm.speed.runner import Plain as PlainRunner
from sliplm.speed.runner import Protected
from sliplm.split.blinding import Blinding
from sliplm.split.model import Options, split_model

Progress = Callable[[int, int], None]

HEIGHT, WIDTH, MATRICES = 4096, 2048, 12  # together larger than caches
RANK = 128
FEW, MANY = 2, 14  # blocks of the small models
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TOKENS, PROMPT = 24, 64
TRIES = 9
LEAST = 1e-6
"""Seconds that anything takes, whatever noise in two measurements makes of their difference."""

Measured = TypeVar("Measured")


def probe(progress: Progress | None = None) -> Speeds:
    """The speeds of this machine, for either side. Raises SlipError."""
    if native is None:
        raise SlipError("--probe needs the native core, which this installation lacks.")
    done = 0

    def step(measure: Callable[..., Measured], *known: object) -> Measured:
        nonlocal done
        found = measure(*known)
        done += 1
        if progress:
            progress(done, 5)
        return found

    read, multiply_adds = step(_products)
    factors = step(_factors)
    encode, decode = step(_masking)
    plain = step(_plain)

    def speeds(around: float, exchange: float, beside: tuple[float, float, float], tls: float) -> Speeds:
        machine = Plain(*beside, *plain)  # type: ignore[call-arg]
        trusted = Trusted(around, exchange, encode, decode, tls, *factors, machine)  # type: ignore[call-arg]
        return Speeds(trusted, Edge(tls, read, multiply_adds, machine))

    return step(_exchange, speeds)


def _products() -> tuple[float, float]:
    """Bytes of Q a second for one row, multiply-adds for many."""
    rng = np.random.default_rng(0)
    matrices = [kernels.prepare(rng.integers(-127, 128, (HEIGHT, WIDTH), np.int8)) for _ in range(MATRICES)]
    edge = Multiplier(matrices, bytes(32))
    x = uniform(ROWS, WIDTH)
    one = _seconds(lambda i: edge.product(i % MATRICES, x[:1]), MATRICES)
    return HEIGHT * WIDTH / one, ROWS * HEIGHT * WIDTH / _seconds(lambda i: edge.product(i % MATRICES, x), 3)


def _factors() -> tuple[float, float]:
    """Bytes of factors in bfloat16 a second for one row, multiply-adds for many."""
    assert native is not None
    many = 4 * MATRICES
    bt = torch.randn(WIDTH, RANK).bfloat16().view(torch.uint16).numpy()
    at = torch.randn(RANK, HEIGHT).bfloat16().view(torch.uint16).numpy()
    found = [native.LowRank16(bt.copy(), [at.copy()], [None]) for _ in range(many)]
    x, out = np.ones((ROWS, WIDTH), np.float32), np.empty((ROWS, HEIGHT), np.float32)
    one = _seconds(lambda i: found[i % many].apply(x[:1], out[:1]), many)
    weights = RANK * (HEIGHT + WIDTH)
    return 2 * weights / one, ROWS * weights / _seconds(lambda i: found[i % many].apply(x, out), 4)


def _masking() -> tuple[float, float]:
    """Seconds a number of a row that is encoded and one that is decoded, beyond those of a short row."""

    def row(width: int, count: int) -> tuple[float, float]:
        found = [_operator(width) for _ in range(count)]
        x, answer, key = np.ones((1, width), np.float32), uniform(1, width), fresh_key()
        out = np.zeros((1, width), np.float32)
        _, inv_c, expected = masking.encode(found[0], x, expand(key, 0, 1, width))
        there = _seconds(lambda i: masking.encode(found[i % count], x, expand(key, 0, 1, width)), count)
        return there, _seconds(lambda i: masking.decode(found[i % count], answer, answer, inv_c, expected, out), count)

    short, long = row(256, 8), row(4096, MATRICES * 16)
    there, back = (max(b - a, 1e-9) / (4096 - 256) for a, b in zip(short, long, strict=True))
    return there, back


def _operator(width: int) -> Operator:
    inner, outer = Blinding.random(width), Blinding.random(width)
    u, uq = uniform(CHECKS, width), uniform(CHECKS, width)
    return Operator(0, (width, width), 127.0 * width**0.5, np.ones((1, width), np.float32), inner, outer, u, uq)


def _plain() -> tuple[float, float]:
    """Bytes of float32 weights a second for one row, multiply-adds for many."""
    weights = [torch.randn(HEIGHT, WIDTH) for _ in range(MATRICES // 2)]
    x = torch.randn(ROWS, WIDTH)

    def product(i: int, rows: int) -> object:
        return torch.nn.functional.linear(x[:rows], weights[i % len(weights)])

    with torch.inference_mode():
        one = _seconds(lambda i: product(i, 1), len(weights))
        return 4 * HEIGHT * WIDTH / one, ROWS * HEIGHT * WIDTH / _seconds(lambda i: product(i, ROWS), 3)


def _exchange(speeds: Callable[[float, float, tuple[float, float, float], float], Speeds]) -> Speeds:
    """`speeds` of what a pass, an exchange and a plain model's pass and blocks take beside their numbers, and a byte
    through TLS."""
    protected, tls = {}, 0.0
    with tempfile.TemporaryDirectory(prefix="slip-probe-") as scratch:
        for blocks in (FEW, MANY):
            place = Path(scratch) / str(blocks)
            _split(place, blocks)
            with ExitStack() as running:
                runner = Protected(place / "split", running, clocks=False)
                runner.decode(4)
                protected[blocks] = median(runner.decode(TOKENS)["seconds"])
                tls = _tls(runner)
        whole = {n: PlainRunner(str(Path(scratch) / str(n) / "model"), torch.float32) for n in (FEW, MANY)}
        plain = _by_turns(lambda blocks: whole[blocks].decode(TOKENS)["seconds"], 2)
        many = _by_turns(lambda blocks: [whole[blocks].prefill(PROMPT)["seconds"]], TRIES)
    shape = of_llama_layout({**SMALL, "num_hidden_layers": 1})
    assert shape is not None
    (block,), (head,) = shape.blocks, shape.around
    bare = speeds(0.0, 0.0, (0.0, 0.0, 0.0), tls)
    each, one, rows = ((taken[MANY] - taken[FEW]) / (MANY - FEW) for taken in (protected, plain, many))
    numbers = sum(masked(group, 1, Split(planes=1), bare, Network()).seconds for group in block.groups)
    exchange = max((each - numbers) / len(block.groups), LEAST)
    around = protected[FEW] - FEW * each - exchange - masked(head, 1, Split(planes=1), bare, Network()).seconds
    machine = bare.edge.plain
    step = plain[FEW] - FEW * one - FLOAT * head.weights / machine.read
    beside = (one - FLOAT * block.weights / machine.read, rows - PROMPT * block.weights / machine.multiply_adds)
    return speeds(max(around, LEAST), exchange, (max(step, LEAST), max(beside[0], LEAST), max(beside[1], LEAST)), tls)


def _split(place: Path, blocks: int) -> None:
    """A model of random weights and its bundles, in `place`."""
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=blocks, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    logging.disable(logging.WARNING)  # that it has no tokenizer
    try:
        split_model(str(place / "model"), place / "split", Options(16, 1, leading=False), check=False)
    finally:
        logging.disable(logging.NOTSET)


def _tls(runner: Protected) -> float:
    """Seconds a byte: rows through the head, whose product takes next to no time, and back."""
    link, group = runner._link, len(runner._slip.shapes) - 1
    height, width = map(int, runner._slip.shapes[group])
    taken: list[float] = []
    for rows in (1, ROWS):
        x = np.ones((rows, width), np.uint32)
        taken.append(_seconds(lambda _, x=x: link.exchange(group, x, lambda: None), 20))  # type: ignore[misc]
    numbers = (ROWS - 1) * (height + width)
    return max(taken[1] - taken[0], 1e-9) / (FLOAT * numbers) / 2  # both sides move each byte


def _by_turns(run: Callable[[int], list[float]], rounds: int) -> dict[int, float]:
    """The median seconds that it gives for few blocks and for many, after a first time that does not count."""
    found: dict[int, list[float]] = {FEW: [], MANY: []}
    for turn in range(rounds + 1):
        for blocks, taken in found.items():
            taken += run(blocks) if turn else run(blocks)[:0]
    return {blocks: median(taken) for blocks, taken in found.items()}


def _seconds(run: Callable[[int], object], calls: int) -> float:
    """Median over some tries of the seconds of a call."""
    taken = []
    for _ in range(TRIES):
        start = time.perf_counter()
        for i in range(calls):
            run(i)
        taken.append((time.perf_counter() - start) / calls)
    return median(taken)
