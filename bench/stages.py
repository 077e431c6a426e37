"""Where the trusted side's CPU time goes while it decodes a batch: milliseconds a token of its one core and thread.

    python bench/stages.py [smollm2 | llama-1.1b | DIR] [--streams 16] [--tokens 16] [--rounds 2] [--turns] [--keep DIR]

The processes are those of `slip bench --streams`: the trusted side on one core, a real edge and a real helper, which
makes the pads beforehand, on the others. A clock of this thread's CPU time stands around every step; the clocks cost
some themselves, and what no step accounts for is the model around the exchanges: attention, norms, embeddings, the
head's logits, Python. With `--turns`, every round is done twice: records moved by the native core, and by Python.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.sched_setaffinity(0, _core := {min(_all := os.sched_getaffinity(0))})  # before torch counts the cores

from sliplm.bundle import EdgeBundle  # noqa: E402
from sliplm.exchange import step  # noqa: E402
from sliplm.pads.pad import Batch  # noqa: E402
from sliplm.pads.pool import Pool  # noqa: E402
from sliplm.protocol.channel import Channel  # noqa: E402
from sliplm.protocol.session import NativeSession, Session  # noqa: E402
from sliplm.speed import models, runner  # noqa: E402
from sliplm.trusted.group import ProtectedGroup  # noqa: E402

spent: Counter[str] = Counter()


def clocked(stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.thread_time()
        try:
            return run(*arguments, **options)
        finally:
            spent[stage] += time.thread_time() - begin

    return timed


class Marks:
    """Notes what was spent whenever the runner samples: at the first token and at the last."""

    def __init__(self, sample: Callable[[], dict[str, float]]) -> None:
        self.sample, self.spent = sample, list[Counter[str]]()

    def __call__(self) -> dict[str, float]:
        self.spent.append(spent.copy())
        return self.sample()


def clock_everything() -> None:
    """Put a clock around each step that is not part of another one."""
    for holder, name, stage in (
        (Pool, "take", "taking pads"),
        (Batch, "mask", "expanding keys"),
        (ProtectedGroup, "_own", "low-rank part"),
        (Channel, "send_staged", "sending"),
        (Channel, "await_input", "waiting"),
        (Channel, "comes", "receiving"),
        (Channel, "read_array", "receiving"),
    ):
        setattr(holder, name, clocked(stage, getattr(holder, name)))
    steps = step.Steps(clocked("encoding", step.STEPS.encode), clocked("decoding and the check", step.STEPS.decode))
    step.exchange.__defaults__ = (steps,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    for name, default in (("streams", 16), ("tokens", 16), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    with ExitStack() as running:
        keep = args.keep or Path(running.enter_context(tempfile.TemporaryDirectory(prefix="slip-stages-")))
        keep.mkdir(parents=True, exist_ok=True)
        directory = models.protect(args.model, models.find(args.model, keep), 1, 16, keep, None)
        shapes = EdgeBundle.open(directory / "edge").shapes
        clock_everything()
        others = _all - _core or _core
        trusted = runner.Protected(directory, running, "helpers", clocks=False, others=others)
        trusted.decode(4, args.streams)
        both = [NativeSession, Session, Session, NativeSession]  # neither is always the second
        for way in [both[i % 4] for i in range(2 * args.rounds)] if args.turns else [None] * args.rounds:
            for session in [known for known in gc.get_objects() if way and isinstance(known, Session)]:
                session.__class__ = way  # between rounds nothing is under way
            pads = trusted.stock(args.tokens, args.streams)["cpu"]
            marks = Marks(trusted._sample)
            trusted._sample = marks  # type: ignore[method-assign]
            step_seconds = trusted.decode(args.tokens, args.streams)["spent"]["cpu"]
            del trusted._sample
            steps = args.tokens - 1  # from the first token, with the prompt, to the last
            each = {name: s / steps / args.streams for name, s in (marks.spent[-1] - marks.spent[0]).items()}
            each["the model around them"] = step_seconds / args.streams - sum(each.values())
            each["all of it, on line"] = step_seconds / args.streams
            each["receiving images for pads"] = pads
            print(f"{args.model}, {args.streams} streams{f', {way.__name__}' if way else ''}")
            for name, seconds in each.items():
                print(f"  {name:28}{1e3 * seconds:8.2f} ms a token")
            for name, size in (("sending", sum(k for _, k in shapes)), ("receiving", sum(m for m, _ in shapes))):
                print(f"  {name:28}{1e3 * each[name] / (4e-6 * size):8.2f} ms a megabyte")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
