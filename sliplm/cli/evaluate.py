"""`slip evaluate` and `slip attack`: what a split is worth, to its owner and to a thief."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, Reference, emit, out, progress_bar, set_up_logging
from sliplm.cli.quiet import quiet_transformers


def evaluate(
    directory: Annotated[Path, typer.Argument(help="DIR, as `slip split` wrote it.")],
    reference: Reference,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; the Python documentation if absent.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to measure on.")] = 4096,
    greedy: Annotated[int, typer.Option(min=0, help="Also compare greedy text for this many prompts.")] = 0,
    tasks: Annotated[str, typer.Option(help="Also run these lm-eval tasks, separated by commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many examples of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Measure agreement with the original, in float32 and beside bfloat16, and what the edge part alone is worth."""
    set_up_logging(False)
    quiet_transformers()
    from sliplm.evaluate.report import evaluate as run

    with progress_bar("evaluating") as progress:
        chosen = [task.strip() for task in tasks.split(",") if task.strip()]
        result = run(directory, reference, text, tokens, greedy, chosen, limit, progress)
    if as_json:
        emit(True, result, "")
        return
    from rich.table import Table

    table = Table("", "perplexity", "mean KL", "worst KL", "top-1", "largest logit error", box=None)
    table.add_row("original (float32)", f"{result['reference']['ppl']:.4f}", "", "", "", "")
    for key, label in (("protected", "protected"), ("bf16", "original (bfloat16)"), ("edge_only", "edge part alone")):
        r = result[key]
        table.add_row(label, f"{r['ppl']:.6g}", f"{r['kl']:.2e}", f"{r['kl_max']:.2e}", f"{r['top1']:.2%}",
                      f"{r['max_abs_logit_error']:.4f}")  # fmt: skip
    out().print(table)
    if g := result.get("greedy"):
        out().print(
            f"greedy text, {g['tokens']} tokens each: {g['identical']} of {g['prompts']} identical, "
            f"{g['ties']} part at a tie, {g['unexplained']} unexplained"
        )
    for task, metrics in result.get("tasks", {}).get("reference", {}).items():
        for metric, value in metrics.items():
            ours = result["tasks"]["protected"][task][metric]
            out().print(f"{task} {metric}: original {value:.4f}, protected {ours:.4f}", markup=False)


def attack(
    directories: Annotated[list[Path], typer.Argument(help="DIR, as `slip split` wrote it; or several, to compare.")],
    reference: Reference,
    method: Annotated[list[str] | None, typer.Option(help="Only this attack; may be given more than once.")] = None,
    budget: Annotated[int, typer.Option(min=512, help="Tokens of text that the thief has.")] = 2048,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; the Python documentation if absent.")] = None,
    own_samples: Annotated[bool, typer.Option(help="Train on text that the original generates.")] = False,
    base: Annotated[str | None, typer.Option(help="A public model that the thief has, too, for `boundary`.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    as_json: Json = False,
) -> None:
    """Try to make use of the edge bundle alone, in every way we know, and compare with a thief who has none."""
    set_up_logging(False)
    quiet_transformers()
    from sliplm.attacks import report as attack_report
    from sliplm.attacks import suite

    if report:
        attack_report.require_plots()
    with progress_bar("attacking") as progress:
        result = suite.attack(directories, reference, method or (), budget, text, own_samples, progress, base=base)
    if report:
        attack_report.write(result, suite.spectra(directories, reference), report)
    lines = [line for name, found in result["verdict"].items() for line in (name, *(f"  {x}" for x in found))]
    emit(as_json, result, "\n".join([*lines, attack_report.LIMITS]))
