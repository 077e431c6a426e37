"""Run the attacks on one or more bundles of a model, and say by how much each beats a thief without any bundle."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from sliplm.errors import BundleError, SlipError
from sliplm.evaluate import agreement, text
from sliplm.evaluate.attacks import arrow, blinding, direct, distill, full, lora, null_space, subspace
from sliplm.evaluate.attacks.stolen import ALL, NONE, Oracles, Stolen
from sliplm.evaluate.attacks.training import LENGTH, Curve, Data, perplexity
from sliplm.split.blinding import Rotation
from sliplm.split.factors import Factors, leading
from sliplm.split.groups import Group, blocks, size
from sliplm.split.layers import Member
from sliplm.split.source import load_whole

logger = logging.getLogger(__name__)

TRAINED: dict[str, Callable[[Stolen, Oracles, Data], Curve]] = {
    "direct": direct.attack,
    "full": full.attack,
    "lora": lora.attack,
    "null-space": null_space.attack,
}
METHODS = ("subspace", "blinding", "arrow", *TRAINED, "distill")
SUCCESS = 0.95  # of the perplexity of the best thief without a bundle: below it, the edge part was worth something
_LARGEST = 4096  # subspaces are looked for in spaces of at most so many dimensions
Progress = Callable[[int, int], None]


def attack(
    directories: Sequence[Path],
    reference: str,
    methods: Sequence[str] = (),
    budget: int = 2048,
    text_file: Path | None = None,
    own_samples: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack the bundles in `directories`, splits of one model `reference`.

    Args:
        methods: of METHODS; all by default.
        budget: tokens of training text that the thief has.
        text_file: UTF-8 text; the Python documentation if absent.
        own_samples: train on text that the original model generates instead (held-out text stays).

    Returns:
        `budget`, `original` (perplexity), the reference curves `scratch` and `placebo`, and `bundles`: by directory,
        the `split` and what each method found.

    Raises:
        SlipError: what was given does not fit together.
    """
    chosen = tuple(methods) or METHODS
    if unknown := [m for m in chosen if m not in METHODS]:
        raise SlipError(f"there is no attack {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    if "blinding" in chosen and importlib.util.find_spec("scipy") is None:
        raise SlipError("the attack 'blinding' needs scipy: pip install 'sliplm[attack]'.")
    stolen = [Stolen(d) for d in directories]
    original = load_whole(reference)
    for s, d in zip(stolen, directories, strict=True):
        if s.config.architectures != [type(original).__name__] or s.config.vocab_size != original.config.vocab_size:
            raise BundleError(f"{reference} is not the model that {d} was split from.")
    trained = [m for m in chosen if m in TRAINED and m != "direct"]
    steps = _Steps(progress, 1 + len(directories) * len(chosen) + bool(trained) + ("distill" in chosen))
    result: dict[str, Any] = {"budget": budget, "text": "samples" if own_samples else str(text_file or "python docs")}
    needs_text = set(chosen) - {"subspace", "blinding", "arrow"}
    if needs_text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(stolen[0].trusted)
        data = read_data(tokenizer, text.read_text(text_file), budget)
        if own_samples:
            data.train = sample(original, data.train.shape)
        result["original"] = perplexity(original, data.held)
        result["held_tokens"] = data.held.numel()
    steps.done()
    if trained:
        result["scratch"] = _curve(full.without(stolen[0].scratch(), data))
        result["placebo"] = _curve(full.without(stolen[0].placebo(), data))
        steps.done()
    if "distill" in chosen:
        result["distill_scratch"] = _curve(distill.attack(stolen[0].scratch(), data, original))
        result["distill_placebo"] = _curve(distill.attack(stolen[0].placebo(), data, original))
        steps.done()
    result["bundles"] = {}
    for s, directory in zip(stolen, directories, strict=True):
        found: dict[str, Any] = {"split": {k: v for k, v in s.settings.items() if k not in ("groups", "ranks")}}
        for method in chosen:
            started = time.perf_counter()
            if method == "subspace":
                found[method] = subspaces(s, original)
            elif method == "blinding":
                found[method] = _blinding(s, original)
            elif method == "arrow":
                found[method] = _arrow(s, original)
            elif method == "distill":
                found[method] = {str(o): _curve(distill.attack(s.model(o), data, original)) for o in (NONE, ALL)}
            else:
                found[method] = {str(o): _curve(TRAINED[method](s, o, data)) for o in (NONE, ALL)}
            found[method]["seconds"] = round(time.perf_counter() - started, 1)
            logger.info("%s: %s took %.0f s", directory, method, found[method]["seconds"])
            steps.done()
        result["bundles"][str(directory)] = found
    result["verdict"] = verdict(result)
    return result


def read_data(tokenizer: Any, source: str, budget: int) -> Data:
    """`budget` tokens to train on; a quarter as many, but 1024 to 4096, held out from the other end of the text."""
    held = max(1024, min(4096, budget // 4)) // LENGTH
    count = budget // LENGTH
    ids = agreement.windows(tokenizer, source, 1 << 40, LENGTH)
    if count < 1 or len(ids) < count + held:
        raise SlipError(f"the text has {ids.numel()} tokens; {max(count, 1) * LENGTH + held * LENGTH} are needed.")
    return Data(ids[:count], ids[-held:])


@torch.no_grad()
def sample(model: Any, shape: Sequence[int]) -> torch.Tensor:
    """Text of the model's own, drawn at temperature 1 from a random first token: ids of `shape` (n, LENGTH)."""
    parts = []
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": shape[1] - 1, "max_new_tokens": shape[1] - 1}
    for start in range(0, shape[0], 16):
        first = torch.randint(model.config.vocab_size, (min(16, shape[0] - start), 1))
        parts.append(model.generate(first, **settings))
    return torch.cat(parts)


def subspaces(stolen: Stolen, original: Any) -> dict[str, Any]:
    """What every detector finds, without blinding secrets and with them: mean overlap, and mean and worst in units of
    chance; on the shorter side of each matrix ("determined"), where a hole pins the subspace down, and on the other."""
    rank = stolen.settings["rank"]
    secret = [Oracles(scales=True)] + [Oracles(scales=True, blinding=True)] * stolen.settings["blinding"]
    scores: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for number, group in enumerate(stolen.groups(original)):
            factors = [leading(_weight(original, m), rank, torch.Generator().manual_seed(0)) for m in group]
            for oracles in secret:
                hidden = stolen.settings["blinding"] and not oracles.blinding
                matrix = stolen.matrix(number, group, oracles, file, 1.0)
                name = "without secrets" if oracles is secret[0] else "blinding secrets given"
                if hidden:  # members cannot be told apart: look for all their subspaces at once
                    inner, outer = rotations(file, group[0].name)
                    u, v = _together(group, factors)
                    jobs = [(matrix, outer.apply(u.T).T, inner.apply(v.T).T)]
                else:
                    parts = [matrix[rows, columns] for _, rows, columns in blocks(group)]
                    jobs = [(p, f.u, f.vt.T) for p, f in zip(parts, factors, strict=True)]
                for part, u, v in jobs:
                    for target, side in ((part, v), (part.T, u)):
                        count, space = side.shape[1], len(side)
                        if space > _LARGEST or count > min(target.shape) // 2:
                            continue
                        where = "determined" if target.shape[0] >= target.shape[1] else "other"
                        for detector, guess in subspace.find(target, count).items():
                            found = subspace.overlap(guess, side)
                            scores.setdefault((name, where, detector), []).append((found, found * space / count))
    result: dict[str, Any] = {}
    for (name, where, detector), values in scores.items():
        table = result.setdefault(name, {}).setdefault(where, {})
        overlaps, times = zip(*values, strict=True)
        table[detector] = {
            "overlap": sum(overlaps) / len(values),
            "times_chance": sum(times) / len(values),
            "worst": max(times),
        }
    return result


def _together(group: Group, factors: list[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of all members' left and right subspaces, in the coordinates of the group's matrix."""
    rows, columns = size(group)
    left, right = [], []
    for (_, at, across), f in zip(blocks(group), factors, strict=True):
        left.append(torch.zeros(rows, len(f.s)))
        right.append(torch.zeros(columns, len(f.s)))
        left[-1][at], right[-1][across] = f.u, f.vt.T
    return torch.linalg.qr(torch.cat(left, 1))[0], torch.linalg.qr(torch.cat(right, 1))[0]


def rotations(file: Any, leader: str) -> tuple[Rotation, Rotation]:
    inner, outer = (
        Rotation(*(file.get_tensor(f"{leader}.{side}_{kind}").numpy() for kind in ("perm", "sign")))
        for side in ("in", "out")
    )
    return inner, outer


def _blinding(stolen: Stolen, original: Any) -> dict[str, Any]:
    """Columns of consecutive groups that read the residual stream, matched: the mean share that is right."""
    groups = stolen.groups(original)
    width = original.config.hidden_size
    # Groups of several members read the stream (q, k, v; gate, up); the head's rows are too many to be worth it.
    readers = [i for i, g in enumerate(groups) if len(g) > 1 and size(g)[1] == width]
    shares = []
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for i, j in pairwise(readers):
            a, b = (stolen.matrix(n, groups[n], NONE, file, 1.0) for n in (i, j))
            secret = [rotations(file, groups[n][0].name)[0] if stolen.settings["blinding"] else None for n in (i, j)]
            shares.append(blinding.recovered(a, b, (secret[0], secret[1]))[0])
    return {"columns_matched": sum(shares) / max(1, len(shares)), "chance": 1 / width}


def _arrow(stolen: Stolen, original: Any) -> dict[str, Any]:
    """Rows identified when the public model *is* the original: no real base is closer."""
    shares, chance = [], []
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for number, group in enumerate(stolen.groups(original)):
            rows = size(group)[0]
            if rows > _LARGEST:
                continue
            public = torch.empty(size(group))
            for m, at, across in blocks(group):
                public[at, across] = _weight(original, m)
            outer = rotations(file, group[0].name)[1] if stolen.settings["blinding"] else None
            shares.append(arrow.identified(stolen.matrix(number, group, NONE, file, 1.0), public, outer))
            chance.append(1 / rows)
    return {"rows_identified": sum(shares) / max(1, len(shares)), "chance": sum(chance) / max(1, len(chance))}


def _weight(model: Any, m: Member) -> torch.Tensor:
    whole = model.get_parameter(m.weight).detach()
    return m.matrix(whole.view(m.parts, -1)[m.part]).float()


def _curve(curve: Curve) -> dict[str, Any]:
    return {"tokens": curve.tokens, "ppl": curve.ppl, "best": curve.best, "rate": curve.rate}


def verdict(result: dict[str, Any]) -> dict[str, list[str]]:
    """For every bundle: each finding in a sentence, with what it rests on."""
    sentences: dict[str, list[str]] = {}
    for name, found in result["bundles"].items():
        lines = sentences.setdefault(name, [])
        for secrets, sides in found.get("subspace", {}).items():
            if secrets == "seconds":
                continue
            detector, best = max(sides["determined"].items(), key=lambda item: item[1]["overlap"])
            many = best["overlap"] > 0.99
            chance = best["times_chance"] < 2
            lines.append(
                f"Protected subspaces, {secrets}: "
                + ("found. " if many else "not found by these detectors. " if chance else "partly found. ")
                + f"The best detector ({detector}) has {best['overlap']:.1%} of them, "
                f"{best['times_chance']:.1f} times chance."
            )
        if "blinding" in found:
            b = found["blinding"]
            lines.append(
                f"Neighbouring layers: {b['columns_matched']:.1%} of columns aligned (chance {b['chance']:.1%})."
            )
        if "arrow" in found:
            b = found["arrow"]
            lines.append(f"With the original itself as public base: {b['rows_identified']:.1%} of rows identified.")
        for method, curves in found.items():
            prefix = "distill_" if method == "distill" else ""
            if method not in (*TRAINED, "distill") or f"{prefix}scratch" not in result:
                continue
            without = {start: result[prefix + start]["best"] for start in ("scratch", "placebo")}
            yardstick = min(without.values())  # whoever has no bundle starts as suits best
            for oracles, curve in curves.items():
                if oracles == "seconds":
                    continue
                ratio = curve["best"] / yardstick
                how = "beats" if ratio < SUCCESS else "is no better than"
                lines.append(
                    f"{method}, oracles {oracles}: perplexity {curve['best']:.4g}, {how} training without a bundle "
                    f"({without['scratch']:.4g} from scratch, {without['placebo']:.4g} from random integers) "
                    f"at {result['budget']} tokens."
                )
    return sentences


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._count, self._total = progress, 0, total

    def done(self) -> None:
        self._count += 1
        if self._progress:
            self._progress(self._count, self._total)


def spectra(directories: Sequence[Path], reference: str) -> dict[str, dict[str, list[float]]]:
    """For the report: the singular values of the first matrix of the middle group, in the original and on the edge."""
    original = load_whole(reference)
    result: dict[str, dict[str, list[float]]] = {}
    for directory in directories:
        stolen = Stolen(directory)
        groups = stolen.groups(original)
        number = len(groups) // 2
        with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
            edge = stolen.matrix(number, groups[number], ALL, file, 1.0)
            _, rows, columns = next(blocks(groups[number]))
        result[str(directory)] = {
            "original": torch.linalg.svdvals(_weight(original, groups[number][0])).tolist(),
            "edge": torch.linalg.svdvals(edge[rows, columns]).tolist(),
        }
    return result
