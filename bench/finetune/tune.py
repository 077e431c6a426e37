"""The owner's side: SmolLM2 fine-tuned on the invented language, whole or as a LoRA that is merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from sliplm.attacks.lora import Correction
from sliplm.attacks.stolen import trim
from sliplm.attacks.training import Curve, Data, learn
from sliplm.split.groups import find_groups

RATES = {"full": 5e-4, "lora": 3e-3}
RANK = 8  # of the LoRA
SEED = 0  # of the order of the text, and of the LoRA's start


def tune(base: Any, kind: str, data: Data, out: Path, tokenizer: Any) -> Curve:
    """Fine-tune a copy of `base` on `data.train` and save it to `out`, float32, with its tokenizer.

    `kind`: full, every parameter; lora, rank RANK on every linear layer but the head, merged. Trained is a model cut to
    the vocabulary of the texts; rows of other tokens stay the base's.
    """
    small = trim(copy.deepcopy(base), data.vocabulary)
    torch.manual_seed(SEED)
    chosen = list(small.parameters()) if kind == "full" else correct(small)
    curve = learn(small, chosen, data, RATES[kind], SEED)
    merge(small)
    with torch.no_grad():
        whole = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        for name, trained in small.state_dict().items():
            if whole[name].shape == trained.shape:
                whole[name].copy_(trained)
            else:
                whole[name][data.vocabulary] = trained
    save(base, whole, out, tokenizer)
    return curve


def save(base: Any, weights: dict[str, torch.Tensor], out: Path, tokenizer: Any) -> None:
    """Write a checkpoint of `base`'s architecture. A model read from a .gguf file says that it is quantized, and
    Transformers does not save such: so a fresh one takes the weights."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(base)._from_config(config)
    model.load_state_dict(weights)
    partial = out.with_name(out.name + ".part")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def correct(model: Any) -> list[torch.nn.Parameter]:
    """Put low-rank corrections on the linear layers of `model`, but the head; they do nothing yet. What is trained."""
    chosen: list[torch.nn.Parameter] = []
    head = model.get_output_embeddings()
    for m in (m for group in find_groups(model) for m in group):
        layer = model.get_submodule(m.name)
        if layer is not head:
            a, b = torch.zeros(m.rows, RANK), torch.randn(RANK, m.columns) / m.columns**0.5
            model.set_submodule(m.name, correction := Correction(layer, a, b))
            chosen += [correction.a, correction.b]
    return chosen


@torch.no_grad()
def merge(model: Any) -> None:
    """Add every correction of `model` to the weight it corrects, and take it away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Correction):
            module.inner.weight += module.a @ module.b
            model.set_submodule(name, module.inner)
