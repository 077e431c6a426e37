"""The result of `slip attack` as one self-contained HTML file: verdict, learning curves, spectra, tables."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from sliplm.attacks.verdict import SUCCESS
from sliplm.extras import require

LIMITS = (
    "These are the attacks that we know, at the budget stated. A thief with more text, more time or a better idea may "
    "do better, and no experiment proves the opposite. Anyone who may query a model can distill its answers; that is "
    "measured here only for what the edge part adds to it."
)
_YARDSTICK = (
    "A thief without any bundle starts from the architecture's own initialisation (stock) or from random integers in "
    f"place of the stolen ones (placebo). An attack succeeds if it is more than {1 - SUCCESS:.0%} better than the "
    "better of the two."
)
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def require_plots() -> None:
    """Raise SlipError, before hours of training, if the report could not be drawn."""
    require("matplotlib", "a report")


def write(result: dict[str, Any], spectra: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Write `path`. `result`: of `attacks.suite.attack`; `spectra`: by bundle, singular values by label."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>slip attack</title><style>{_STYLE}</style>",
        f"<h1>What the stolen part is worth</h1><p>Training text: {html.escape(result['text'])}; budget "
        f"{result['budget']:,} tokens, an eighth of which (at most 2048) chooses the learning rate; the original's "
        f"perplexity {result.get('original', float('nan')):.4g}. {_YARDSTICK}</p>",
        "<h2>Verdict</h2>",
    ]
    for name, lines in result["verdict"].items():
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts.append(f"<h3>{html.escape(name)}</h3><ul>{items}</ul>")
    parts.append(f"<p><b>Limits.</b> {LIMITS}</p>")
    if any(result.get("without", {}).values()):
        parts += ["<h2>Learning curves</h2>", _image(_curves(result))]
    if spectra:
        parts += ["<h2>Singular values of one matrix, original and on the edge</h2>", _image(_spectra(spectra))]
    parts += _tables(result)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _tables(result: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, found in result["bundles"].items():
        for method in ("direct", "full", "lora", "null-space", "distill", "boundary"):
            rows += [(Path(name).name, method, o, *_cells(line)) for o, line in found.get(method, {}).items()]
    for objective, lines in result.get("without", {}).items():
        for start, line in lines.items():
            rows.append(("no bundle", f"{start}, trained on {objective}", "", *_cells(line)))
    parts = []
    if rows:
        head = ("bundle", "attack", "oracles, or start", "at start", "at the end", "seeds", "learning rate")
        parts = ["<h2>Attacks</h2>", _table(head, rows)]
    rows = [
        (
            Path(name).name,
            secrets,
            side,
            detector,
            f"{v['overlap']:.4f}",
            f"{v['times_chance']:.2f}",
            f"{v['worst']:.1f}",
        )
        for name, found in result["bundles"].items()
        for secrets, sides in found.get("subspace", {}).items()
        for side, detectors in sides.items()
        for detector, v in detectors.items()
    ]
    if rows:
        head = ("bundle", "thief", "side", "detector", "overlap", "times chance", "worst")
        parts += ["<h2>Detectors of the protected subspaces</h2>", _table(head, rows)]
    rows = [
        (Path(name).name, method, what, f"{value:.4f}")
        for name, found in result["bundles"].items()
        for method in ("blinding", "public-base")
        for what, value in found.get(method, {}).items()
    ]
    if rows:
        parts += ["<h2>Blinding</h2>", _table(("bundle", "attack", "what", "share"), rows)]
    return parts


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    spread = f"{line['low']:.4g} to {line['high']:.4g}" if line["high"] > line["low"] else ""
    return f"{line['ppl'][0]:.4g}", f"{line['reached']:.4g}", spread, f"{line['rate']:g}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(r, "td") for r in rows) + "</table>"


def _curves(result: dict[str, Any]) -> Any:
    axes, figure = _axes(len(result["bundles"]))
    for ax, (name, found) in zip(axes, result["bundles"].items(), strict=True):
        for colour, method in enumerate(("full", "lora", "null-space", "distill", "boundary")):
            for oracles, line in found.get(method, {}).items():
                style = "-" if oracles == "none" else ":"
                ax.plot(
                    line["tokens"], line["ppl"], style, color=f"C{colour}", marker=".", label=f"{method}, {oracles}"
                )
        for dark, (objective, lines) in zip("kb", result["without"].items(), strict=False):
            for style, (start, line) in zip(("-", "--"), lines.items(), strict=True):
                label = f"no bundle: {start}, {objective}"
                ax.plot(line["tokens"], line["ppl"], style, color=dark, lw=2, label=label)
        ax.axhline(result["original"], color="grey", label="original")
        ax.set(yscale="log", xlabel="training tokens", ylabel="perplexity on held-out text", title=Path(name).name)
        ax.legend(fontsize=7)
    return figure


def _spectra(spectra: dict[str, dict[str, list[float]]]) -> Any:
    axes, figure = _axes(len(spectra))
    for ax, (name, lines) in zip(axes, spectra.items(), strict=True):
        for label, values in lines.items():
            ax.plot(values, label=label)
        ax.set(yscale="log", xlabel="index", ylabel="singular value", title=Path(name).name)
        ax.legend()
    return figure


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6 * count, 4.5), layout="constrained")
    return list(figure.subplots(1, count, squeeze=False)[0]), figure


def _image(figure: Any) -> str:
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=110)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(raw.getvalue()).decode()}">'
