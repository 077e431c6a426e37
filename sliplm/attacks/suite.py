"""Run the attacks on one or more bundles of a model, and say by how much each beats a thief without any bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from sliplm.attacks import boundary, direct, distill, full, lora, matrices, null_space
from sliplm.attacks.lines import Runs, line
from sliplm.attacks.stolen import ALL, NONE, Oracles, Stolen, trim
from sliplm.attacks.training import LENGTH, Data, language_loss, perplexity
from sliplm.attacks.verdict import verdict
from sliplm.errors import BundleError, SlipError
from sliplm.evaluate import agreement, text
from sliplm.extras import require
from sliplm.open.blocks import block_list, block_of
from sliplm.split.groups import blocks
from sliplm.split.places import Place
from sliplm.split.plan import read_plan
from sliplm.split.source import load_whole

logger = logging.getLogger(__name__)

MATRICES = {"subspace": matrices.subspaces, "blinding": matrices.neighbours, "public-base": matrices.public_base}
TRAINED: dict[str, Any] = {"full": full, "lora": lora, "null-space": null_space, "distill": full}
METHODS = (*MATRICES, "direct", *TRAINED, "boundary")
SEEDS = 3  # of the lines that are compared: without oracles, and without a bundle
Progress = Callable[[int, int], None]


def attack(
    directories: Sequence[Path],
    reference: str,
    methods: Sequence[str] = (),
    budget: int = 2048,
    text_file: Path | None = None,
    own_samples: bool = False,
    progress: Progress | None = None,
    finished: Path | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Attack the bundles in `directories`, splits of one model `reference`.

    Args:
        methods: of METHODS; all by default.
        budget: tokens of text that the thief has, to train on and to choose a learning rate with.
        text_file: UTF-8 text; the Python documentation if absent.
        own_samples: train on text that the original model generates instead (held-out text stays).
        base: a public model of the same shape, which the thief at a border has, too.
        finished: keep finished training runs in this file, and use those that are there.

    Returns:
        `budget`, `original` (perplexity), `without`: the lines of thieves without a bundle, by objective (text,
        answers) and start; and `bundles`: by directory, the `split` and what each method found. Lines are as
        `lines.line` returns them. `seconds`: wall and processor time by what took it.

    Raises:
        SlipError: what was given does not fit together.
    """
    chosen = tuple(methods) or METHODS
    if unknown := [m for m in chosen if m not in METHODS]:
        raise SlipError(f"there is no attack {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    if {"blinding", "public-base"} & set(chosen):
        require("scipy", "this attack")
    stolen = [Stolen(d) for d in directories]
    for s, d in zip(stolen, directories, strict=True):
        if not s.plan:
            raise SlipError(
                f"no block of {d} is masked: the edge has blocks in plain or not at all; nothing to attack."
            )
    original = load_whole(reference)
    for s, d in zip(stolen, directories, strict=True):
        if s.config.architectures != [type(original).__name__] or s.config.vocab_size != original.config.vocab_size:
            raise BundleError(f"{reference} is not the model that {d} was split from.")
    objectives = [
        o for o, needed in (("text", set(TRAINED) - {"distill"}), ("answers", {"distill"})) if needed & {*chosen}
    ]
    steps = _Steps(progress, len(directories) * len(chosen) + len(objectives))
    result: dict[str, Any] = {"budget": budget, "text": "samples" if own_samples else str(text_file or "python docs")}
    result["seconds"] = {}
    result["bundles"] = {
        str(d): {"split": {k: v for k, v in s.settings.items() if k not in ("groups", "ranks")}}
        | ({} if s.edge.opened is None else {"open": s.edge.opened.note})
        for s, d in zip(stolen, directories, strict=True)
    }
    for method in (m for m in chosen if m in MATRICES):
        for s, (directory, found) in zip(stolen, result["bundles"].items(), strict=True):
            with _timed(result, directory, method):
                found[method] = MATRICES[method](s, original)
            steps.done()
    if set(chosen) - set(MATRICES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(stolen[0].trusted)
        data = read_data(
            tokenizer, text.read_text(text_file), budget, partial(sample, original) if own_samples else None
        )
        trim(original, data.vocabulary)
        public = trim(load_whole(base), data.vocabulary) if base else None
        result["original"] = perplexity(original, data.held)
        result |= {"held_tokens": data.held.numel(), "vocabulary": len(data.vocabulary)}
        runs = Runs(finished, f"{budget} {result['text']} {len(data.vocabulary)}")
        losses = {"text": language_loss, "answers": distill.answers_of(original)}
        result["without"] = {
            objective: {
                name: line(
                    f"{objective} {name}",
                    lambda seed, make=make: trim(make(seed), data.vocabulary),  # type: ignore[misc]
                    lambda model: full.prepare(model, stolen[0], NONE),
                    data,
                    runs,
                    full.RATES,
                    SEEDS,
                    losses[objective],
                )
                for name, make in (("stock", stolen[0].scratch), ("placebo", stolen[0].placebo))
            }
            for objective in objectives
        }
        for _ in objectives:
            steps.done()
        for s, (directory, found) in zip(stolen, result["bundles"].items(), strict=True):
            for method in (m for m in chosen if m not in MATRICES):
                with _timed(result, directory, method):
                    if method == "boundary":
                        found[method] = _at_borders(s, original, data, public)
                    else:
                        found[method] = {str(o): _learned(s, o, method, data, runs, losses) for o in (NONE, ALL)}
                steps.done()
    result["verdict"] = verdict(result)
    return result


def _learned(
    stolen: Stolen, oracles: Oracles, method: str, data: Data, runs: Runs, losses: dict[str, Any]
) -> dict[str, Any]:
    def start(seed: int) -> Any:
        return trim(stolen.model(oracles, seed), data.vocabulary)

    if method == "direct":
        return direct.attack(start(0), data)
    module = TRAINED[method]
    return line(
        f"{stolen.digest} {method} {oracles}",
        start,
        lambda model: module.prepare(model, stolen, oracles),
        data,
        runs,
        module.RATES if oracles == NONE else module.RATES_IF_KNOWN,
        SEEDS if oracles == NONE and module is full else 1,
        losses["answers" if method == "distill" else "text"],
    )


def _at_borders(stolen: Stolen, original: Any, data: Data, public: Any) -> dict[str, Any]:
    """Lines of the attack `boundary`, none where no block is open."""
    place = block_list(original)
    where: list[Place] = ["open"] * len(original.get_submodule(place))
    for plan in read_plan(stolen.settings):
        if (number := block_of(plan.members[0], place)) is not None:
            where[number] = plan.place
    return boundary.attack(original, where, data, stolen.plan[0].rank, public)


def read_data(
    tokenizer: Any, source: str, budget: int, own: Callable[[tuple[int, int]], torch.Tensor] | None = None
) -> Data:
    """`budget` tokens for the thief, an eighth of them (256 to 2048) to choose with; a quarter as many, but 1024 to
    4096, held out from the other end of the text. `own`: makes the thief's windows instead."""
    held = max(1024, min(4096, budget // 4)) // LENGTH
    count = budget // LENGTH
    ids = agreement.windows(tokenizer, source, 1 << 40, LENGTH)
    if count < 2 or len(ids) < count + held:
        raise SlipError(f"the text has {ids.numel()} tokens; {(max(count, 2) + held) * LENGTH} are needed.")
    choosing = max(1, min(8, count // 8))
    mine = ids[:count] if own is None else own((count, LENGTH))
    vocabulary = torch.cat([ids.flatten(), mine.flatten()]).unique()
    mine, rest = (torch.searchsorted(vocabulary, part) for part in (mine, ids[-held:]))
    return Data(mine[:-choosing], mine[-choosing:], rest, vocabulary)


@torch.no_grad()
def sample(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Text of the model's own, drawn at temperature 1 from a random first token: ids of `shape` (n, LENGTH)."""
    parts = []
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": shape[1] - 1, "max_new_tokens": shape[1] - 1}
    for start in range(0, shape[0], 16):
        first = torch.randint(model.config.vocab_size, (min(16, shape[0] - start), 1))
        parts.append(model.generate(first, **settings))
    return torch.cat(parts)


@contextmanager
def _timed(result: dict[str, Any], directory: str, method: str) -> Iterator[None]:
    """Note in `result["seconds"]` the wall and the processor time that the block takes."""
    wall, used = time.perf_counter(), time.process_time()
    yield
    wall, used = time.perf_counter() - wall, time.process_time() - used
    result["seconds"][f"{Path(directory).name}: {method}"] = [round(wall, 1), round(used, 1)]
    logger.info("%s: %s took %.0f s", directory, method, wall)


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
            "original": torch.linalg.svdvals(matrices.weight(original, groups[number][0])).tolist(),
            "edge": torch.linalg.svdvals(edge[rows, columns]).tolist(),
        }
    return result
