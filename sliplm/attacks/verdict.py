"""The findings of a suite in sentences, each with what it rests on."""

from __future__ import annotations

from typing import Any

SUCCESS = 0.95  # of the perplexity of the best thief without a bundle: below it, the edge part was worth something


def yardstick(result: dict[str, Any], objective: str) -> dict[str, Any]:
    """The better of the lines without a bundle, by the thief's own validation text; `objective`: text or answers."""
    lines = result["without"][objective]
    best: dict[str, Any] = min(lines.values(), key=lambda line: line["valid"])
    return best


def verdict(result: dict[str, Any]) -> dict[str, list[str]]:
    """For every bundle: each finding in a sentence."""
    return {
        name: [*_plain(found), *_matrices(found), *_lines(result, found), *_borders(result, found)]
        for name, found in result["bundles"].items()
    }


def _plain(found: dict[str, Any]) -> list[str]:
    """What needs no attack."""
    if "open" not in found:
        return []
    return [f"Not protected: {found['open']}. Every thief below has these weights; what is attacked is the rest."]


def _matrices(found: dict[str, Any]) -> list[str]:
    sentences = []
    for secrets, sides in found.get("subspace", {}).items():
        detector, best = max(sides["determined"].items(), key=lambda item: item[1]["overlap"])
        what = "found" if best["overlap"] > 0.99 else "not found" if best["times_chance"] < 2 else "partly found"
        sentences.append(
            f"Protected subspaces, {secrets}: {what}. The best detector ({detector}) has {best['overlap']:.1%}, "
            f"{best['times_chance']:.1f} times chance."
        )
    if b := found.get("blinding"):
        sentences.append(
            f"Neighbouring layers: {b['columns_matched']:.1%} of columns aligned (chance {b['chance']:.1%})."
        )
    if b := found.get("public-base"):
        sentences.append(
            f"With a public base 2 % away: {b['rows']:.1%} of rows and {b['columns']:.1%} of columns identified, "
            f"{b['directions']:.1%} of directions lined up (chance {b['chance']:.1%}); the rotation is undone to a "
            f"correlation of {b['rotation']:.3f}."
        )
    return sentences


def _lines(result: dict[str, Any], found: dict[str, Any]) -> list[str]:
    sentences = []
    for method in ("full", "lora", "null-space", "distill"):
        for oracles, line in found.get(method, {}).items():
            best = yardstick(result, "answers" if method == "distill" else "text")
            ratio = line["reached"] / best["reached"]
            how = f"{1 - ratio:.0%} better" if ratio < 1 else f"{ratio - 1:.0%} worse"
            if ratio >= SUCCESS:
                success = "No success."
            elif line["high"] < best["low"]:
                success = "The edge part was worth something."
            else:
                success = "That is within what other seeds give."
            sentences.append(
                f"{method}, oracles {oracles}: perplexity {line['reached']:.4g}, {how} than the best thief without a "
                f"bundle ({best['reached']:.4g}, seeds {best['low']:.4g} to {best['high']:.4g}). {success}"
            )
    return sentences


def _borders(result: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"boundary, from {start}: perplexity {line['reached']:.4g} after {line['tokens'][-1]:,} tokens were seen where "
        f"hidden states cross in the clear; {line['ppl'][0]:.4g} before any, {result['original']:.4g} the original."
        for start, line in found.get("boundary", {}).items()
    ]
