"""The models that are measured: a checkpoint of the user's, the demo's, or a shape with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from sliplm.bundle import MANIFEST
from sliplm.demo import find_smollm2
from sliplm.split.model import Options, split_model
from sliplm.split.writer import new_directory

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-7b-block": {
        "vocab_size": 256,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-70b-block": {
        "vocab_size": 256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Llama shapes; their weights are random, which changes no time."""

BLOCKS = {name for name, shape in SHAPES.items() if shape["num_hidden_layers"] == 1}
"""One decoder block of a model too large to measure whole; its vocabulary is so small that embedding and head are
one percent of it at most."""


def find(name: str, keep: Path) -> str:
    """What `split` takes for `name`: "smollm2", a name in SHAPES (made under `keep` if it is not there yet), or itself.

    Raises UnsupportedModelError if the demo's model is not installed.
    """
    if name == "smollm2":
        return find_smollm2()
    if name not in SHAPES:
        return name
    directory = keep / name
    if not directory.exists():
        config = transformers.LlamaConfig(**SHAPES[name], tie_word_embeddings=False, max_position_embeddings=2048)
        torch.manual_seed(0)
        with new_directory(directory) as partial:
            transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    return str(directory)


def protect(
    name: str, source: str, planes: int, rank: int, keep: Path, progress: Callable[[int, int], None] | None
) -> Path:
    """The bundles of `source`, made under `keep` if they are not there yet. Random weights have no directions worth
    protecting, so random ones are: that saves minutes and changes no time either. Raises SlipError."""
    directory = keep / f"{Path(name).name}-planes{planes}-rank{rank}"
    if not (directory / "trusted" / MANIFEST).exists():
        split_model(source, directory, Options(rank, planes, leading=name not in SHAPES), progress, check=False)
    return directory
