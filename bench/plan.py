"""Whether `slip plan` is right: measure plans over an emulated network, and compare with what it predicts.

    python bench/plan.py [--rtt 0ms,5ms,20ms] [--plans all,first:2,trusted:2] [--model smollm2] [--planes 1] [--json]

Measured are passes of the model, one token each. The trusted side is `speed.runner`'s, the edge a real `slip edge`, on
this machine; a TCP proxy between them delays every byte by half the round trip in either direction, and holds the
bandwidth. Its own delay is found with an echo through it, as `ping` would find a network's, and is part of the round
trip that the prediction gets; at 0ms there is no proxy. The machine's speeds are probed before (`slip plan --probe`),
so nothing else should run. netem would emulate below TCP; the proxy runs everywhere, and it has what a plan depends on,
delay and bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `slip trusted` has it

import msgspec
import transformers

from sliplm.planner import units
from sliplm.planner.costs import Network, Split
from sliplm.planner.network import emulated, ping
from sliplm.planner.predict import Work, predict
from sliplm.planner.probe import probe
from sliplm.planner.traced import trace
from sliplm.speed.models import find
from sliplm.speed.runner import PROMPT, Protected
from sliplm.split.model import Options, split_model


def measure(directory: Path, network: Network, tokens: int, prompt: int) -> dict[str, float]:
    """Median seconds of a decoded token and of a prompt over the emulated network, and round trips of a token."""
    with ExitStack() as running:

        def way(target: str) -> str:
            return running.enter_context(emulated(target, network))

        runner = Protected(directory, running, clocks=False, way=way)
        runner.decode(4)
        decoded = runner.decode(tokens)
        return {
            "seconds": median(decoded["seconds"]),
            "round_trips": decoded["spent"]["exchanges"],
            "first": min(runner.prefill(prompt)["seconds"] for _ in range(2)),  # the first finds no memory mapped
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for `slip bench`")
    parser.add_argument("--plans", default="all")
    parser.add_argument("--rtt", default="0ms,5ms,20ms", help="round-trip times, with commas between them")
    parser.add_argument("--bandwidth", help="such as 100Mbit; unlimited if absent")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="keep bundles here, and take them from here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    plans = units.plans(options.plans)
    bandwidth = units.bandwidth(options.bandwidth) if options.bandwidth else float("inf")
    speeds = probe()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="slip-plan-") as scratch:
        place = options.keep or Path(scratch)
        source = find(options.model, place)
        shape = trace(source)
        for plan in plans:
            directory = place / f"{options.model}-{plan}-planes{options.planes}".replace(":", "-")
            if not directory.exists():
                split_model(source, directory, Options(16, options.planes, plan=plan), check=False)
            for text in options.rtt.split(","):
                network = Network(units.duration(text), bandwidth)
                real = ping(network)
                measured = measure(directory, network, options.tokens, options.prompt)
                (expected,) = predict(
                    shape, [plan], Work(prompt=max(PROMPT, options.prompt)), Split(16, options.planes), speeds,
                    Network(real, bandwidth),
                )  # fmt: skip
                row = {
                    "plan": plan,
                    "rtt": text,
                    "rtt_of_an_echo": real,
                    "round_trips": [expected.round_trips, measured["round_trips"]],
                    "token_seconds": [expected.seconds, measured["seconds"]],
                    "prompt_seconds": [expected.first, measured["first"]],
                    "predicted_over_measured": expected.seconds / measured["seconds"],
                    "prompt_predicted_over_measured": expected.first / measured["first"],
                }
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    if options.json:
        print(json.dumps({"speeds": msgspec.to_builtins(speeds), "rows": rows}))


if __name__ == "__main__":
    main()
