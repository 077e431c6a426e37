"""Run the protected and the unprotected model by turns, on the same machine and in the same minutes, and compare.

Every contender is a process of its own (`speed.runner`, or a peer's program); one works at a time. Timings on shared
machines drift, so what counts is the ratio of medians within a run, never a time by itself.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from sliplm import kernels
from sliplm.bundle import EdgeBundle
from sliplm.exchange.check import CHECKS
from sliplm.planner.costs import Network
from sliplm.protocol.frames import HEADER
from sliplm.speed import drafts as guessing
from sliplm.speed import leverage, peers
from sliplm.speed.contender import Ask, contender
from sliplm.speed.models import BLOCKS, find, protect

Peers = Mapping[str, Callable[[int], float]]
"""Decode so many tokens: tokens a second."""


def bench(
    models: Sequence[str],
    planes: Sequence[int] = (1, 2),
    rank: int = 16,
    tokens: int = 48,
    prefill: int = 512,
    rounds: int = 3,
    long: int = 0,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    streams: Sequence[int] = (),
    with_peers: bool = False,
    drafts: Network | None = None,
) -> dict[str, Any]:
    """Measure every one of `models` with every number of `planes`; `rounds` times `tokens` decoded tokens each, and
    prompts of `prefill` tokens (0 for none), and the same tokens by llama.cpp if `with_peers`; then decode `long` more
    tokens over TLS and see what memory that left occupied. With `streams`, measure leverage (`speed.leverage`) instead;
    with `drafts`, what guessing is worth over such a network (`speed.drafts`). Bundles stay in `keep`, and are taken
    from there.

    Raises SlipError: a model cannot be had or split, a process fails, or llama.cpp is not installed.
    """
    threads = 1 if streams else torch.get_num_threads()
    llama = peers.find_llama_bench() if with_peers else ""
    result: dict[str, Any] = {"kernels": kernels.describe(), "threads": threads, "results": []}
    with tempfile.TemporaryDirectory(prefix="slip-bench-") as scratch:
        place = keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        for name in models:
            source = find(name, place)
            for count in planes:
                say(f"{Path(name).name}, planes {count}: splitting, if that is not done yet")
                directory = protect(name, source, count, rank, place, None)
                say(f"{Path(name).name}, planes {count}: measuring")
                if drafts is not None:
                    measured = {"drafts": guessing.measure(directory, tokens, rounds, drafts, say)}
                elif streams:
                    measured = leverage.measure(source, directory, streams, tokens, rounds, say)
                else:
                    others = _peers(llama, source, place / f"{Path(name).name}-q8_0.gguf", threads) if llama else {}
                    measured = _measure(source, directory, tokens, prefill, rounds, long, say, others)
                what = {"model": Path(name).name, "block": name in BLOCKS, "planes": count, "rank": rank}
                result["results"].append(what | measured)
    return result


def _peers(llama: str, source: str, model: Path, threads: int) -> Peers:
    if not model.exists():
        peers.write_gguf(source, model)
    return {peers.NAME: lambda tokens: peers.tokens_per_second(llama, model, tokens, threads)}


def _measure(
    source: str,
    directory: Path,
    tokens: int,
    prefill: int,
    rounds: int,
    long: int,
    say: Callable[[str], None],
    others: Peers,
) -> dict[str, Any]:
    with ExitStack() as running:
        ask = {
            name: running.enter_context(contender(kind, where))
            for name, kind, where in (
                ("bf16", "bfloat16", source),
                ("fp32", "float32", source),
                ("protected", "protected", str(directory)),
            )
        }
        turns = {
            "bf16": ("bf16", {}),
            "fp32": ("fp32", {}),
            "tls": ("protected", {"link": "tls"}),
            "in process": ("protected", {"link": "process"}),
            "tls, pads included": ("protected", {"link": "tls", "pads": "made"}),
        }
        for who, how in turns.values():  # warms up, and shows what fails early
            ask[who](do="decode", tokens=4, **how)
        decoded: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        theirs: dict[str, list[float]] = {name: [] for name in others}
        for number in range(rounds):
            for name, (who, how) in turns.items():
                decoded[name].append(ask[who](do="decode", tokens=tokens, **how))
            for name, decode in others.items():
                theirs[name].append(decode(tokens))
            say(f"  decoding, round {number + 1} of {rounds}")
        prefilled: dict[str, list[float]] = {name: [] for name in ("bf16", "fp32", "tls", "in process")}
        for number in range(rounds if prefill else 0):
            for name, times in prefilled.items():
                who, how = turns[name]
                times.append(ask[who](do="prefill", tokens=prefill, **how)["seconds"])
            say(f"  prompts, round {number + 1} of {rounds}")
        memory = {name: [m["peak"] for m in ask[name](do="memory")["processes"]] for name in ask}
        growth = _growth(ask["protected"], long, say) if long else {}
    summary = _summary(directory, decoded, prefilled, prefill, memory)
    return summary | _against(theirs, summary["decode"]["tls"]["tokens_per_second"]) | growth


def _against(theirs: dict[str, list[float]], ours: float) -> dict[str, Any]:
    """The peers' tokens a second, and how many times them ours, over TLS, are."""
    speeds = {name: median(values) for name, values in theirs.items()}
    times = {name: ours / speed for name, speed in speeds.items()}
    return {"peers": speeds, "times_peers": times} if speeds else {}


def _growth(ask: Ask, tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Memory that either side holds after `tokens` more tokens, minus what it held after the first tenth of them."""
    held = []
    for number in range(10):
        for _ in range(max(1, tokens // 1000)):
            ask(do="decode", tokens=100)
        held.append([m["now"] for m in ask(do="memory")["processes"]])
        say(f"  many tokens: {number + 1} of 10 tenths")
    growth = [last - first for first, last in zip(held[0], held[-1], strict=True)]
    return {"growth": {"tokens": tokens, "trusted": growth[0], "edge": growth[1]}}


def _summary(
    directory: Path,
    decoded: dict[str, list[dict[str, Any]]],
    prefilled: dict[str, list[float]],
    prefill: int,
    memory: dict[str, list[float]],
) -> dict[str, Any]:
    steps = {name: [s for run in runs for s in run["seconds"]] for name, runs in decoded.items()}
    steps["tls, pads included"] = [run["with_pads"] for run in decoded["tls, pads included"]]
    middle = {name: median(values) for name, values in steps.items()}
    decode = {
        name: {
            "tokens_per_second": 1 / middle[name],
            "ms": 1e3 * middle[name],
            "ms_p10": 1e3 * _quantile(values, 0),
            "ms_p90": 1e3 * _quantile(values, 8),
            "times_bf16": middle["bf16"] / middle[name],
        }
        for name, values in steps.items()
    }
    prompts = {
        name: {"tokens_per_second": prefill / median(t), "times_bf16": median(prefilled["bf16"]) / median(t)}
        for name, t in prefilled.items()
        if t
    }
    cpu = {name: median(run["spent"]["cpu"] for run in runs) for name, runs in decoded.items()}
    size = sum(f.stat().st_size for f in (directory / "edge").iterdir())
    return {
        "decode": decode,
        "prefill": prompts,
        "per_token": {
            "cpu_ms_unprotected": 1e3 * cpu["bf16"],
            "cpu_ms_trusted": 1e3 * cpu["tls"],
            "cpu_ms_edge": 1e3 * median(run["spent"]["edge_cpu"] for run in decoded["tls"]),
            "trusted_share_of_cpu": cpu["tls"] / cpu["bf16"],
            **_traffic(directory, decoded["tls"]),
        },
        "exchange_us": {"tls": _stages(decoded["tls"]), "in process": _stages(decoded["in process"])},
        "multiply_adds": _multiply_adds(directory),
        "memory": {
            "bf16": memory["bf16"][0],
            "fp32": memory["fp32"][0],
            "trusted": memory["protected"][0],
            "edge": memory["protected"][1],
            "edge_bundle": size,
        },
    }


def _traffic(directory: Path, runs: list[dict[str, Any]]) -> dict[str, float]:
    """Round trips of one decoded token, counted, and the bytes each way with frame headers, by the groups' shapes."""
    shapes = EdgeBundle.open(directory / "edge").shapes
    return {
        "round_trips": median(run["spent"]["exchanges"] for run in runs),
        "bytes_sent": sum(4 * k + HEADER.size for _, k in shapes),
        "bytes_received": sum(4 * m + HEADER.size for m, _ in shapes),
    }


def _stages(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean microseconds of a decoded token's exchange by stage, on the trusted side."""
    total = {key: sum(run["spent"][key] for run in runs) for key in runs[0]["spent"]}
    per = {key: total[key] / total["exchanges"] / 1e3 for key in total}
    stages = {
        "pad": per["pads"],
        "encode and mask": per["encode"],
        "low-rank": per["own"],
        "decode": per["decode"],
    }
    if total["sending"]:
        rest = per["link"] - per["own"] - per["sending"] - per["waiting"] - per["receiving"]
        stages |= {"send": per["sending"], "wait": per["waiting"], "receive": per["receiving"], "link, other": rest}
    else:
        stages["edge's product"] = per["link"] - per["own"]
    return stages


def _multiply_adds(directory: Path) -> dict[str, float]:
    """Of one token, attention apart: the unprotected model's, and the trusted side's as a share of them. The check's,
    in integers, stand apart; masks and scales, one addition or multiplication a number, are not counted."""
    from safetensors import safe_open

    shapes = EdgeBundle.open(directory / "edge").shapes
    with safe_open(directory / "trusted" / "model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dictionary
    factors = [math.prod(shape) for name, shape in sizes.items() if name.endswith((".factor_a", ".factor_b"))]
    planes = next(shape[0] for name, shape in sizes.items() if name.endswith(".scales"))
    plain = sum(m * k for m, k in shapes) / planes
    check = sum(CHECKS * (m + k) for m, k in shapes)
    return {
        "unprotected": plain,
        "trusted_share": sum(factors) / plain,
        "check_share": check / plain,
        "edge": planes,
    }


def _quantile(values: list[float], which: int) -> float:
    return quantiles(values, n=10)[which] if len(values) > 1 else values[0]
