"""How many users a core of the trusted side has room for, and what else they need.

    slip bench --streams 1,8,16 --json > leverage.json
    python -m bench.capacity leverage.json [--reads 5] [--users 100] [--probe] [--json]

A user is a stream that is read at so many tokens a second (--reads). The trusted side's processor time of a token is
what `slip bench --streams` measured. Models too large to be measured whole are derived from one of their blocks: so
many times its cost, and the head's by its share of the numbers that go to the edge and come back, as the trusted side's
work does; for pads, of those that come back. Edges and helpers are as fast as `slip plan --probe` finds a machine: this
one with --probe, else two cores of an AMD EPYC; an edge multiplies one batch at a time. Bytes follow from the shapes.

What is left out, and has to be added: prompts, and room for hours in which more is asked. All blocks are masked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sliplm.errors import SlipError
from sliplm.planner.costs import FLOAT, Network, Pass, Split, cost
from sliplm.planner.shapes import Group, Model, of_llama_layout
from sliplm.planner.speeds import USUAL, Speeds
from sliplm.speed.models import SHAPES

WHOLE: dict[str, tuple[str, dict[str, int]]] = {
    "llama-1.1b": ("1.1B", {}),
    "llama-7b-block": ("7B", {"num_hidden_layers": 32, "vocab_size": 32000}),
    "llama-70b-block": ("70B", {"num_hidden_layers": 80, "vocab_size": 32000}),
}
"""What each measured shape stands for, and what the whole model has that a block has not."""


@dataclass(frozen=True)
class Capacity:
    """Of a model at so many streams in a batch.

    Attributes:
        derived: whether its costs are those of one block, scaled.
        trusted_ms, pads_ms: of the trusted side's processor a token, on line and for pads.
        tokens: a second, of one trusted core; each: of one of its streams. users: that one core has room for.
        cores, edges, helpers: that all users need.
        sent, received, images: bytes a token, to the edge, back, and from helpers. edge_bits, helper_bits: a second of
            one user.
    """

    model: str
    derived: bool
    planes: int
    streams: int
    trusted_ms: float
    pads_ms: float
    tokens: float
    each: float
    users: float
    cores: float
    edges: float
    helpers: float
    sent: float
    received: float
    images: float
    edge_bits: float
    helper_bits: float


def numbers(groups: Iterable[Group], planes: int) -> tuple[int, int]:
    """How many go to the edge for one token, and come back."""
    sizes = [group.size for group in groups]
    return sum(columns for _, columns in sizes), planes * sum(rows for rows, _ in sizes)


def blocks(model: Model, planes: int) -> tuple[float, float]:
    """How many times one block's cost the whole model's is, on line and for pads."""
    sent, received = numbers(model.blocks[0].groups, planes)
    head_sent, head_received = numbers(model.around, planes)
    count = len(model.blocks)
    return count + (head_sent + head_received) / (sent + received), count + head_received / received


def capacity(result: dict[str, Any], row: dict[str, Any], reads: float, users: float, speeds: Speeds) -> Capacity:
    """Of one of the `streams` of one of the `results` of `slip bench --streams --json`. Users read `reads` tokens a
    second each; `users` of them need cores, edges and helpers."""
    name, whole = WHOLE[result["model"]]
    model = of_llama_layout(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPES[result["model"]], **whole}, name
    )
    assert model is not None
    planes, streams = result["planes"], row["streams"]
    on_line, of_pads = blocks(model, planes) if whole else (1.0, 1.0)
    trusted_ms, pads_ms = on_line * row["trusted_cpu_ms"], of_pads * row["pads_cpu_ms"]
    tokens = 1e3 / (trusted_ms + pads_ms)
    batch = cost(
        model, ["masked"] * len(model.blocks), Pass(streams=streams), Split(result["rank"], planes), speeds, Network()
    )
    groups = [*(group for block in model.blocks for group in block.groups), *model.around]
    images = FLOAT * numbers(groups, planes)[1]
    making = planes * model.multiply_adds / speeds.edge.multiply_adds + images * speeds.edge.tls
    sent, received, wanted = batch.sent / streams, batch.received / streams, users * reads
    return Capacity(
        model=name,
        derived=bool(whole),
        planes=planes,
        streams=streams,
        trusted_ms=trusted_ms,
        pads_ms=pads_ms,
        tokens=tokens,
        each=tokens / streams,
        users=tokens / reads,
        cores=wanted / tokens,
        edges=wanted * batch.edge / streams,
        helpers=wanted * making,
        sent=sent,
        received=received,
        images=images,
        edge_bits=8 * reads * (sent + received),
        helper_bits=8 * reads * images,
    )


def read(files: Sequence[Path]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Results and their rows, by model and streams; of what was measured again, the last. Raises SlipError."""
    found: dict[tuple[int, int, int], tuple[dict[str, Any], dict[str, Any]]] = {}
    for file in files:
        try:
            results = json.loads(file.read_text("utf-8"))["results"]
            for result in results:
                for row in result["streams"]:
                    if result["model"] in WHOLE:
                        at = list(WHOLE).index(result["model"]), result["planes"], row["streams"]
                        _ = row["trusted_cpu_ms"] + row["pads_cpu_ms"] + result["rank"]
                        found[at] = result, row
        except OSError as error:
            raise SlipError(f"cannot read {file}: {error.strerror}.") from None
        except (ValueError, LookupError, TypeError):
            raise SlipError(f"{file} is not what `slip bench --streams 1,8,16 --json` prints.") from None
    if not found:
        raise SlipError(f"there is none of {', '.join(WHOLE)} in what was measured.")
    return [found[at] for at in sorted(found)]


def table(rows: Sequence[Capacity], reads: float, users: float) -> str:
    """In Markdown."""
    head = (
        "model", "streams in a batch", "trusted CPU ms a token: on line + pads", "tokens/s a core: all (each stream)",
        f"users a core, at {reads:g} tokens/s", f"{users:g} users: trusted cores", "edges", "helpers",
        "kB a token: to the edge, back, from helpers", "Mbit/s a user: edges, helpers",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        users_of_a_core = f"{r.users:.2g}" if r.each >= reads else f"({r.users:.2g})"
        cells = (
            r.model + (", from a block" if r.derived else "") + (", two planes" if r.planes == 2 else ""),
            r.streams, f"{r.trusted_ms:.1f} + {r.pads_ms:.1f}", f"{r.tokens:.1f} ({r.each:.1f})", users_of_a_core,
            math.ceil(r.cores), math.ceil(r.edges), math.ceil(r.helpers),
            f"{r.sent / 1e3:,.0f}, {r.received / 1e3:,.0f}, {r.images / 1e3:,.0f}",
            f"{r.edge_bits / 1e6:,.0f}, {r.helper_bits / 1e6:,.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="+", type=Path, help="what `slip bench --streams 1,8,16 --json` printed")
    parser.add_argument("--reads", type=float, default=5.0, help="tokens a second that one user reads")
    parser.add_argument("--users", type=float, default=100.0, help="for whom cores, edges and helpers are counted")
    parser.add_argument("--probe", action="store_true", help="edges and helpers are as fast as this machine")
    parser.add_argument("--json", action="store_true")
    said = parser.parse_args()
    if not (0 < said.reads < math.inf and 0 < said.users < math.inf):
        parser.error("--reads and --users are above zero")
    try:
        measured = read(said.measured)
        speeds = USUAL
        if said.probe:
            from sliplm.planner.probe import probe

            speeds = probe()
        rows = [capacity(result, row, said.reads, said.users, speeds) for result, row in measured]
    except SlipError as error:
        sys.exit(f"bench.capacity: {error}")
    print(json.dumps([asdict(row) for row in rows]) if said.json else table(rows, said.reads, said.users))


if __name__ == "__main__":
    main()
