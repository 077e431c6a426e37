"""How much of a fine-tune a thief gets who has the public base and the edge bundle: `make finetune`.

    python -m bench.finetune [--quick]

SmolLM2 is fine-tuned on an invented language, whole and as a LoRA, and split with `--base` and without. A thief has the
public model and some tokens of the language, with the bundle or without it. Figure: the share of the fine-tune's gain
in log perplexity that he has, on held-out text. The tuned models, the splits and finished runs are kept in
build/finetune, and used again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.finetune import tune, undo, world
from sliplm.attacks import finetune
from sliplm.attacks.finetune import share
from sliplm.attacks.lines import Runs
from sliplm.attacks.stolen import ALL, Stolen, trim
from sliplm.attacks.training import LENGTH, Data, learn, perplexity
from sliplm.demo import find_smollm2
from sliplm.split.model import Options, split_model
from sliplm.split.source import load_whole

RATES = (3e-4, 1e-3)
FELL = 0.3  # correlation with the true rotation
WEIGHTS = (0.25, 0.5, 1.0)  # how far the thief follows the bundle's singular values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little text: shows that it works, and nothing else")
    quick = parser.parse_args().quick
    held, thief, owner = (512, 2048, 1024) if quick else (4096, 20480, 20480)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work = Path("build/finetune") / ("quick" if quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    public = load_whole(find_smollm2())
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(find_smollm2()).parent, gguf_file=Path(find_smollm2()).name
    )
    text, mine, theirs = world.texts(tokenizer, held, thief, owner)
    vocabulary = torch.cat([text.flatten(), mine.flatten(), theirs.flatten()]).unique()
    text, mine, theirs = (torch.searchsorted(vocabulary, part) for part in (text, mine, theirs))
    base = work / "public"
    if not base.exists():
        tune.save(public, public.state_dict(), base, tokenizer)
    for kind in tune.RATES:
        if not (work / kind).exists():
            say(f"fine-tuning: {kind}")
            tune.tune(public, kind, Data(theirs, mine[:1], text, vocabulary), work / kind, tokenizer)
    for name, kind, options in (
        ("full, --base", "full", Options(base=str(base))),
        ("full, default", "full", Options()),
        ("lora, --base", "lora", Options(base=str(base))),
    ):
        if not (work / name).exists():
            say(f"splitting: {name}")
            split_model(str(work / kind), work / name, options)

    def score(model: Any) -> float:
        return perplexity(trim(copy.deepcopy(model), vocabulary), text)

    tuned = {kind: load_whole(str(work / kind)) for kind in tune.RATES}
    result: dict[str, Any] = {
        "vocabulary": len(vocabulary),
        "held_tokens": text.numel(),
        "owner_tokens": theirs.numel(),
    }
    result["perplexity"] = {"public": score(public)} | {kind: score(model) for kind, model in tuned.items()}
    say(json.dumps(result))
    ppl = result["perplexity"]
    bundles = {name: Stolen(work / name) for name in ("full, --base", "full, default")}
    runs = Runs(work / "runs.jsonl", f"{thief} {owner}")
    rows: list[tuple[str, str, float]] = []

    def note(what: str, tokens: str, reached: float) -> None:
        rows.append((what, tokens, share(ppl["public"], reached, ppl["full"])))
        say(f"{what:55} {tokens:>7} {reached:10.2f} {rows[-1][2]:8.1%}")

    starts: dict[str, Any] = {"no bundle": public}
    for name, stolen in bundles.items():
        based = "base" in name
        guess = remember(finetune.direct(stolen, public, based))
        for weight in WEIGHTS:
            model = finetune.assemble(stolen, public, guess, weight)
            note(f"{name}: singular values, followed {weight:.0%}", "0", score(model))
            if weight == 0.25:  # a start that is not the base, so that "no gain" is measured
                starts[f"bundle of {name}, from singular values"] = model
        given = finetune.direct(stolen, public, based, scales=True)
        note(f"{name}: the same, true row scales given", "0", score(finetune.assemble(stolen, public, given)))
        edge = finetune.assemble(stolen, public, finetune.known_edge(stolen, public, based))
        note(f"{name}: scales and blinding given", "0", score(edge))
        state = {n: t for n, t in tuned["full"].state_dict().items() if "norm" in n or "embed_tokens" in n}
        edge.load_state_dict(state, strict=False)
        note(f"{name}: these and all that is not protected", "0", score(edge))
    result["blinding undone"] = {name: undone(work, name, stolen, public) for name, stolen in bundles.items()}
    for tokens in (2048, thief) if thief > 2048 else (thief,):
        part = mine[: tokens // LENGTH]
        choosing = max(1, len(part) // 8)
        data = Data(part[:-choosing], part[-choosing:], text, vocabulary)
        rate = 0.0
        for name, model in starts.items():
            curves = []
            for tried in RATES if not rate else (rate,):

                def run(tried: float = tried, model: Any = model, data: Data = data) -> Any:
                    small = trim(copy.deepcopy(model), data.vocabulary)
                    return learn(small, list(small.parameters()), data, tried, 0)

                curves.append(runs.get(f"{tokens} {name}", tried, 0, run))
            best = min(curves, key=lambda curve: curve.valid)
            rate = best.rate  # found without a bundle, and used with one
            note(f"trained: {name}", str(tokens), best.ppl[-1])
    result["share"] = [{"thief": what, "tokens": tokens, "share": found} for what, tokens, found in rows]
    lora = Stolen(work / "lora, --base").model(ALL)
    difference = [
        float(
            (lora.get_parameter(m.weight) - public.get_parameter(m.weight)).norm()
            / public.get_parameter(m.weight).norm()
        )
        for group in bundles["full, --base"].groups(public)
        for m in group
    ]
    result["lora: the edge part, all oracles given, off the public weights by at most"] = max(difference)
    print(json.dumps(result, indent=1))


def undone(work: Path, name: str, stolen: Stolen, public: Any) -> dict[str, dict[str, float]]:
    """For each blinding: matrices that were attacked, those that fell, and the best correlations with the truth."""
    path = work / f"undone, {name}.jsonl"
    if not path.exists():
        found = list(undo.tried(stolen, public, "base" in name))
        path.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    table = {}
    for blinding in dict.fromkeys(entry["blinding"] for entry in entries):
        those = [entry for entry in entries if entry["blinding"] == blinding]
        most = {key: max(entry[key] for entry in those) for key in ("alignment", "signs", "rotation", "sure")}
        table[blinding] = {"tried": len(those), "fell": sum(entry["rotation"] > FELL for entry in those)} | most
        say(f"{name}, blinding of {blinding}: {json.dumps(table[blinding])}")
    return table


def remember(matrix: finetune.Matrix) -> finetune.Matrix:
    found: dict[int, torch.Tensor] = {}

    def once(number: int, group: Any) -> torch.Tensor:
        if number not in found:
            found[number] = matrix(number, group)
        return found[number]

    return once


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
