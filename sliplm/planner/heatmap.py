"""The result of `slip sensitivity` as one self-contained HTML file: a heat map of inline SVG, and a table."""

from __future__ import annotations

import html
import math
from pathlib import Path

from sliplm.planner.sensitivity import BlockWorth, Worth

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#222}"
)
_CELL, _HEIGHT, _LEFT, _TOP = 46, 18, 44, 150
_MOST = math.log(100)
"""Colours end where the perplexity is so many times the original's."""


def write(worth: Worth, path: Path) -> None:
    """Write `path`."""
    name = html.escape(worth.model)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>slip sensitivity: {name}</title>"
        f"<style>{_STYLE}</style><h1>What the blocks of {name} are worth</h1>",
        f"<p>Perplexity on {worth.tokens:,} tokens: {worth.original:.4g}. Each cell is the perplexity when one thing "
        "is changed in one block: the block is skipped; its matrices are random; all of them, or one layer's, lack so "
        "many leading singular components. White is the original's perplexity, the darkest red a hundred times that "
        "or more.</p>",
        _svg(worth),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def columns(worth: Worth) -> list[str]:
    """The headings of the map."""
    layers = list(dict.fromkeys(name for block in worth.blocks for name in block.layers))
    of_layers = [f"{name} without {k}" for name in layers for k in worth.ranks]
    return ["skipped", "random", *(f"all without {k}" for k in worth.ranks), *of_layers]


def cells(worth: Worth, block: BlockWorth) -> dict[str, float]:
    """One block's perplexities by heading."""
    found = {"skipped": block.skipped, "random": block.random}
    found |= {f"all without {k}": ppl for k, ppl in block.all.items()}
    return found | {f"{name} without {k}": ppl for name, by in block.layers.items() for k, ppl in by.items()}


def _svg(worth: Worth) -> str:
    headings = columns(worth)
    width, height = _LEFT + _CELL * len(headings) + 90, _TOP + _HEIGHT * len(worth.blocks) + 4
    parts = [f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    for i, heading in enumerate(headings):
        x, y = _LEFT + _CELL * (i + 0.5), _TOP - 6
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-55 {x} {y})">{html.escape(heading)}</text>')
    for number, block in enumerate(worth.blocks):
        y = _TOP + _HEIGHT * number
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{number}</text>')
        found = cells(worth, block)
        for i, heading in enumerate(headings):
            if (ppl := found.get(heading)) is None:  # blocks may differ in their layers
                continue
            x, heat = _LEFT + _CELL * i, min(1.0, max(0.0, math.log(ppl / worth.original) / _MOST))
            parts.append(
                f"<g><title>block {number}, {html.escape(heading)}: {ppl:.6g}</title>"
                f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_HEIGHT}" fill="{_colour(heat)}"/>'
                f'<text x="{x + _CELL / 2}" y="{y + 13}" text-anchor="middle">{_short(ppl)}</text></g>'
            )
    return "".join(parts) + "</svg>"


def _colour(heat: float) -> str:
    """White at 0, red at 1."""
    rest = round(255 - 175 * heat)
    return f"#{round(255 - 30 * heat):02x}{rest:02x}{rest:02x}"


def _short(ppl: float) -> str:
    return f"{ppl:.3g}" if ppl < 1e4 else f"{ppl:.0e}".replace("e+0", "e").replace("e+", "e")
