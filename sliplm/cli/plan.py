"""`slip plan` and `slip sensitivity`: what plans cost, and what blocks are worth, before anything is split."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sliplm.cli.common import Json, Model, Planes, Rank, emit, err, out, progress_bar, set_up_logging
from sliplm.errors import SlipError

if TYPE_CHECKING:
    from sliplm.planner.predict import Prediction
    from sliplm.planner.speeds import Speeds


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, a directory with one, a .gguf file, or a hub id.")],
    plans: Annotated[
        str, typer.Option(help="With commas between them: all, first:N, last:N, blocks:0-3,28-31, trusted:N.")
    ] = "all,first:2,trusted:2",
    rtt: Annotated[str, typer.Option(help="Round-trip time between the sides, such as 20ms.")] = "0ms",
    bandwidth: Annotated[str, typer.Option(help="Each way, such as 1Gbit.")] = "1Gbit",
    rank: Rank = 16,
    planes: Planes = 2,
    streams: Annotated[int, typer.Option(min=1, max=4096, help="Sequences that are decoded at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens of each one's prompt.")] = 512,
    device_speed: Annotated[
        Path | None,
        typer.Option(help='Speeds of both machines: the "speeds" that --probe --json prints, or parts of two of them.'),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine's speeds: ten seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Predict what plans would cost, side by side: speed, traffic, arithmetic and memory, from MODEL's shapes alone."""
    if probe and device_speed:
        raise SlipError("--probe measures speeds and --device-speed gives them: leave one of them out.")
    set_up_logging(False)
    from sliplm.planner import shapes, units
    from sliplm.planner.costs import Network, Split
    from sliplm.planner.predict import Work, predict
    from sliplm.split.plan import Options

    Options(rank, planes)  # refuses what cannot be
    network = Network(units.duration(rtt), units.bandwidth(bandwidth))
    shape = shapes.read(model)
    speeds = _speeds(probe, device_speed)
    found = predict(shape, units.plans(plans), Work(streams, prompt), Split(rank, planes), speeds, network)
    if as_json:
        import msgspec

        what = {"name": shape.name, "parameters": shape.parameters, "blocks": len(shape.blocks)}
        asked = {"rank": rank, "planes": planes, "streams": streams, "prompt": prompt, "rtt": rtt}
        described = {"model": what, "asked": asked | {"bandwidth": bandwidth}, "speeds": msgspec.to_builtins(speeds)}
        emit(True, {**described, "plans": [asdict(p) for p in found]}, "")
        return
    out().print(
        f"{shape.name}: {shape.parameters / 1e9:.3g} billion weights, {len(shape.blocks)} blocks; rank {rank}, "
        f"{planes} plane{'s' * (planes > 1)}; {rtt} and {bandwidth} between the sides",
        markup=False,
    )
    _show(found, streams)
    if not (probe or device_speed):
        err().print("Speeds of two cores with AVX-512 for either side; --probe measures this machine.", markup=False)


def sensitivity(
    model: Model,
    ranks: Annotated[
        str, typer.Option(help="Take away so many leading singular components, each in turn.")
    ] = "4,16,64",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; the Python documentation if absent.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of text to measure on.")] = 512,
    report: Annotated[Path | None, typer.Option(help="Write a heat map (HTML) here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what every block and layer is worth: the perplexity without it, or without its leading components."""
    set_up_logging(False)
    from sliplm.planner.units import numbers

    counts = numbers(ranks)
    from sliplm.cli.quiet import quiet_transformers

    quiet_transformers()
    from sliplm.planner import heatmap
    from sliplm.planner.sensitivity import measure

    with progress_bar("measuring") as progress:
        found = measure(model, counts, text, tokens, progress)
    if report:
        heatmap.write(found, report)
    if as_json:
        emit(True, asdict(found), "")
        return
    from rich.table import Table

    table = Table("block", box=None, pad_edge=False)
    for name in ("skipped", "random", *(f"without {k}" for k in counts), "most sensitive layer"):
        table.add_column(name, justify="right")
    for number, block in enumerate(found.blocks):
        worst = max(block.layers, key=lambda name: max(block.layers[name].values()))
        cells = (block.skipped, block.random, *block.all.values())
        table.add_row(str(number), *(f"{ppl:.4g}" for ppl in cells), worst)
    out().print(f"{found.model}: perplexity {found.original:.4g} on {found.tokens} tokens; and with one block")
    out().print(table)


def _speeds(probe: bool, given: Path | None) -> Speeds:
    from sliplm.planner import speeds

    if given:
        return speeds.read(given)
    if not probe:
        return speeds.USUAL
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `slip trusted` has it; before torch is imported
    from sliplm.cli.quiet import quiet_transformers

    quiet_transformers()
    from sliplm.planner.probe import probe as measure

    with progress_bar("measuring this machine") as progress:
        return measure(progress)


def _show(found: list[Prediction], streams: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for p in found:
        table.add_column(p.plan, justify="right")
    rows = {
        "blocks masked, trusted, open": [f"{p.masked}, {p.trusted}, {p.open}" for p in found],
        "round trips a token": [f"{p.round_trips:,.0f}" for p in found],
        "to the edge and back, a token": [f"{size(p.sent)}, {size(p.received)}" for p in found],
        f"decoding, tokens/s{' of all streams' * (streams > 1)}": [f"{p.decode:.3g}" for p in found],
        "a token takes": [_time(p.seconds) for p in found],
        "prompt, tokens/s": [f"{p.prefill:.3g}" for p in found],
        "the prompt takes": [_time(p.first) for p in found],
        "trusted side's arithmetic": [f"{p.trusted_share:.2%}" for p in found],
        "trusted side's memory": [size(p.trusted_bytes) for p in found],
        "edge's memory": [size(p.edge_bytes) for p in found],
        "pads: a token, the prompt": [f"{size(p.pad_bytes)}, {size(p.stock_bytes)}" for p in found],
        "helpers, each as fast as the edge": [f"{p.helpers}" for p in found],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    out().print(table)


def size(count: float) -> str:
    """`count` bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
