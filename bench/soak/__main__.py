"""Long experiments with real processes, each of which breaks something and checks that the promises hold.

    python -m bench.soak [streams tamper helpers fuzz kills] [--bundle DIR] [--size N] [--quick] [--json]

    streams  16 streams through 4 edges at once: every text right, nobody starved, memory flat
    tamper   10,000 wrong answers of edges: all caught, none becomes text
    helpers  10,000 wrong images of helpers: all caught, no request lost or wrong
    fuzz     1,000,000 malformed frames, to both sides: no crash, no hang, other sessions undisturbed
    kills    200 times kill -9 of any side: the others recover within 5 s, no pad is used twice

Without --bundle, SmolLM2 is split first. --quick takes a small fraction of everything, --size as many lies, frames,
kills or seconds of one experiment. Exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.soak import fuzz, helpers, kills, streams, tamper

EXPERIMENTS = {  # the sizes: of the real thing, and with --quick
    "tamper": (tamper.run, 10_000, 100),
    "helpers": (helpers.run, 10_000, 100),
    "fuzz": (fuzz.run, 1_000_000, 10_000),
    "kills": (kills.run, 200, 6),
    "streams": (streams.run, 600, 30),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", help="which; all if none is named")
    parser.add_argument("--bundle", type=Path, help="DIR, as `slip split` wrote it")
    parser.add_argument("--size", type=int, help="how many; for one experiment")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.experiments) - EXPERIMENTS.keys():
        parser.error(f"there is no experiment {min(unknown)!r}, only {', '.join(EXPERIMENTS)}")
    if args.size is not None and (len(args.experiments) != 1 or args.size < 1):
        parser.error("--size is a positive number, and for one experiment")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes under test are ended too
    logging.getLogger("sliplm").setLevel(logging.CRITICAL)  # the hostile parts' own: they fail on purpose
    console = Console(stderr=args.json, soft_wrap=True, highlight=False)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="slip-soak-") as scratch:
        bundle = args.bundle or _split(Path(scratch) / "bundle", console)
        for name in args.experiments or EXPERIMENTS:
            console.print(f"{name} ...", style="bold")
            run, size, small = EXPERIMENTS[name]
            results[name] = run(bundle, args.size or (small if args.quick else size))
            console.print(_table(results[name]))
    broken = [f"{name}: {problem}" for name, result in results.items() for problem in result["problems"]]
    if args.json:
        print(json.dumps(results))
    for sentence in broken:
        console.print(sentence, style="red", markup=False)
    console.print("a promise was broken" if broken else "all promises were kept", style="bold")
    return 1 if broken else 0


def _split(directory: Path, console: Console) -> Path:
    from sliplm.demo import find_smollm2
    from sliplm.split.model import split_model

    console.print("splitting SmolLM2 ...", style="bold")
    split_model(find_smollm2(), directory)
    return directory


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for key, value in result.items():
        if key != "problems":
            table.add_row(key, json.dumps(value) if isinstance(value, dict | list) else str(value))
    return table


if __name__ == "__main__":
    sys.exit(main())
