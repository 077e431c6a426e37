"""One line of the report: a start and a way to train it, at several learning rates and seeds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sliplm.attacks.training import Curve, Data, Loss, language_loss, learn

Start = Callable[[int], Any]  # seed -> model
Prepare = Callable[[Any], list[nn.Parameter]]  # changes the model; what is trained


class Runs:
    """Curves of finished runs, kept in a file if `path` is given, so that an interrupted evaluation goes on."""

    def __init__(self, path: Path | None, budget: str) -> None:
        self._path, self._budget = path, budget
        self._found: dict[str, Curve] = {}
        if path and path.exists():
            for entry in map(json.loads, path.read_text().splitlines()):
                key = entry.pop("key")
                self._found[key] = Curve(**entry)

    def get(self, line: str, rate: float, seed: int, run: Callable[[], Curve]) -> Curve:
        """The curve of this run, from the file or from `run()`. `line` says all else that the result depends on."""
        key = f"{self._budget} {line} {rate:g} {seed}"
        if key not in self._found:
            self._found[key] = run()
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps({"key": key} | asdict(self._found[key])) + "\n")
        return self._found[key]


def line(
    name: str,
    start: Start,
    prepare: Prepare,
    data: Data,
    runs: Runs,
    rates: Sequence[float],
    seeds: int,
    loss: Loss = language_loss,
) -> dict[str, Any]:
    """Search the learning rate with the first seed, on the thief's validation text; then run the other seeds at it.

    Returns:
        `rate`, `searched` (validation perplexity by rate), `valid` (mean over seeds), `tokens` and `ppl` (held-out,
        mean over seeds), `reached` (the last of them), `low` and `high` (the same of the best and worst seed), `seeds`.
    """
    made: dict[int, Any] = {}
    starts: dict[int, float] = {}  # what `prepare` adds does nothing before it is trained

    def run(rate: float, seed: int) -> Curve:
        if seed not in made:
            made.clear()
            made[seed] = start(seed)
        model = copy.deepcopy(made[seed])
        torch.manual_seed(seed)  # for what `prepare` draws
        curve = learn(model, prepare(model), data, rate, seed, loss, starts.get(seed))
        starts[seed] = curve.ppl[0]
        return curve

    searched = [runs.get(name, rate, 0, lambda rate=rate: run(rate, 0)) for rate in rates]  # type: ignore[misc]
    best = min(searched, key=lambda c: c.valid)
    curves = [best, *(runs.get(name, best.rate, s, lambda s=s: run(best.rate, s)) for s in range(1, seeds))]  # type: ignore[misc]
    ends = [c.ppl[-1] for c in curves]
    return {
        "rate": best.rate,
        "searched": {f"{c.rate:g}": c.valid for c in searched},
        "valid": sum(c.valid for c in curves) / len(curves),
        "tokens": best.tokens,
        "ppl": [sum(points) / len(points) for points in zip(*(c.ppl for c in curves), strict=True)],
        "reached": sum(ends) / len(ends),
        "low": min(ends),
        "high": max(ends),
        "seeds": len(ends),
    }
