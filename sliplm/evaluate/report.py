"""Everything `slip evaluate` reports, as one dictionary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle
from sliplm import bundle
from sliplm.attacks.stolen import ALL, Stolen
from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.evaluate import agreement, text
from sliplm.evaluate.tasks import run_tasks
from sliplm.split.source import load_whole

WINDOW = 256
GREEDY_TOKENS = 64


def evaluate(
    directory: Path,
    reference: str,
    text_file: Path | None = None,
    tokens: int = 4096,
    greedy: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Agreement of the protected model, of the original in bfloat16 and of the edge part alone with the original in
    float32: keys `reference`, `protected`, `bf16`, `edge_only` (see `agreement.Agreement`), and `greedy` and `tasks` if
    asked for. Of `tasks`, `limit` examples each; all if None.

    Exchanges run in this process, with the same objects as across machines.

    Raises:
        BundleError, UnsupportedModelError: what was given does not fit together, or is no language model.
        SlipError: the text cannot be read, or the tasks cannot be run.
    """
    edge_digest = bundle.EdgeBundle.open(directory / "edge").digest.hex()
    if bundle.open_trusted(directory / "trusted").edge_digest != edge_digest:
        raise BundleError(f"{directory / 'edge'} and {directory / 'trusted'} come from two different splits.")
    protected = _load(directory / "trusted")
    protected.slip.attach(directory / "edge")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "trusted")
    original = load_whole(reference)
    if type(original) is not type(protected) or original.config.vocab_size != protected.config.vocab_size:
        raise BundleError(f"{reference} is not the model that {directory} was split from.")
    models = {
        "protected": protected,
        "bf16": copy.deepcopy(original).to(torch.bfloat16),
        "edge_only": edge_only(directory),
    }
    source = text.read_text(text_file)
    data = agreement.windows(tokenizer, source, tokens, WINDOW)
    if data.numel() < 2:
        raise BundleError("the text is too short to measure on.")
    ppl, agreements = agreement.compare(models, original, data, progress)
    result: dict[str, Any] = {"tokens": data.numel(), "reference": {"ppl": ppl}}
    result |= {name: a.to_dict() for name, a in agreements.items()}
    if greedy:
        del models
        starts = text.prompts(source, greedy)
        outcome = agreement.compare_greedy(protected, original, tokenizer, starts, GREEDY_TOKENS, progress)
        result["greedy"] = {"tokens": GREEDY_TOKENS, **asdict(outcome)}
    if tasks:
        pair = {"reference": original, "protected": protected}
        result["tasks"] = {name: run_tasks(model, tokenizer, tasks, limit) for name, model in pair.items()}
    return result


def edge_only(directory: Path) -> Any:
    """What a copied edge bundle is worth in the thief's best case: the original with everything but the trusted side's
    singular components. A real thief has Q alone. Raises BundleError."""
    with torch.random.fork_rng(devices=[]):  # what is initialised afresh, and replaced, has a seed of its own
        return Stolen(directory).model(ALL).eval()


def _load(trusted: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(trusted)
    if not set(config.architectures or ()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UnsupportedModelError(f"{trusted} holds no model that continues text; only those can be evaluated.")
    return transformers.AutoModelForCausalLM.from_pretrained(trusted).eval()
