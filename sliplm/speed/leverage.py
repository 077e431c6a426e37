"""What the trusted side's core is worth: its CPU time for a token beside what the whole model would cost there.

Leverage is tokens a CPU second of the trusted process with an edge, over tokens a CPU second of the same core running
the whole model unprotected, in bfloat16 or in float32, whichever is the faster there (many processors multiply
bfloat16 several times slower); all decode the same number of sequences as one batch. Below 1, an owner is better off
without an edge. Each of the three processes has one core and one thread, and they take turns on it; the edge, and
whoever else makes pads, have the other cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sliplm.speed.contender import Ask, contender
from sliplm.speed.cores import apart

DTYPES = {"bf16_cpu_ms": "bfloat16", "fp32_cpu_ms": "float32"}
"""What is measured of the unprotected model."""


def measure(
    source: str,
    directory: Path,
    streams: Sequence[int],
    tokens: int,
    rounds: int,
    say: Callable[[str], None],
    pads: str = "helpers",
) -> dict[str, Any]:
    """Measure the bundles in `directory` beside the whole model: for every number of `streams`, `rounds` times so many
    sequences, `tokens` tokens of each. `pads` says who makes them, as `speed.runner.Protected` does.

    The trusted side's memory is taken before pads are stocked. Raises SlipError.
    """
    core, others = apart()
    with ExitStack() as running:
        plain = {name: running.enter_context(contender(dtype, source, core)) for name, dtype in DTYPES.items()}
        options = {"pads": pads, "clocks": False, "others": others}
        trusted = running.enter_context(contender("protected", str(directory), core, **options))
        trusted(do="decode", tokens=4)  # warms up, so that what is mapped has been read
        held = trusted(do="memory")["processes"][0]
        memory = {
            "resident": held["now"],
            "anonymous": held["anonymous"],
            "peak": held["peak"],
            "bundle": sum(f.stat().st_size for f in (directory / "trusted").iterdir() if f.is_file()),
            "load_seconds": trusted(do="loaded")["seconds"],
            "bf16": 2 * plain["bf16_cpu_ms"](do="loaded")["parameters"],
        }
        rows = []
        for count in sorted(set(streams)):  # upwards, as `stock` wants it
            rows.append({"streams": count, "pads": pads, **_row(plain, trusted, count, tokens, rounds)})
            say(f"  {count} streams: leverage {rows[-1]['leverage']:.2f}")
    return {"trusted": memory, "streams": rows}


def _row(plain: Mapping[str, Ask], trusted: Ask, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    """Medians of CPU milliseconds a token, and their ratio."""
    for ask in (*plain.values(), trusted):  # as many tokens as will be counted: its memory has been used before
        ask(do="decode", tokens=tokens, streams=streams)
    spent: dict[str, list[float]] = {name: [] for name in ("trusted_cpu_ms", "pads_cpu_ms", *plain)}
    per_step = 1e3 / streams
    for _ in range(rounds):
        for name, ask in plain.items():
            spent[name].append(per_step * ask(do="decode", tokens=tokens, streams=streams)["spent"]["cpu"])
        spent["pads_cpu_ms"].append(1e3 * trusted(do="stock", tokens=tokens, streams=streams)["cpu"])
        spent["trusted_cpu_ms"].append(per_step * trusted(do="decode", tokens=tokens, streams=streams)["spent"]["cpu"])
    row = {name: median(values) for name, values in spent.items()}
    unprotected = min(row[name] for name in plain)
    leverage = unprotected / (row["trusted_cpu_ms"] + row["pads_cpu_ms"])
    return {"leverage": leverage, "unprotected_cpu_ms": unprotected, **row}
