"""Shapes of a model of any architecture: Transformers makes it of its configuration, without weights, and one pass
shows which matrices share a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sliplm.errors import UnsupportedModelError
from sliplm.open.blocks import block_list, block_of
from sliplm.planner.shapes import Block, Group, Model
from sliplm.split import source
from sliplm.split.groups import Group as Found
from sliplm.split.groups import Sum, find_groups

_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # experts that a token reaches, as configurations say it


def trace(model: str) -> Model:
    """The shapes of `model`: a config.json, a directory, a .gguf file or a hub id. Raises UnsupportedModelError."""
    config, name = _configuration(model)
    if not source.continues_text(config):
        raise UnsupportedModelError(f"{name} does not continue text, and plans are for models that do.")
    with source.fake_mode():
        skeleton: Any = source.make_skeleton(config)
        groups = find_groups(skeleton)
        place = block_list(skeleton)
        settings = config.get_text_config()
        cache, scores = _attention(settings)
        inside: list[list[Group]] = [[] for _ in skeleton.get_submodule(place)]
        around: list[Group] = []
        for group in groups:
            block = block_of(group[0].name, place)
            (around if block is None else inside[block]).append(_group(group, settings))
        table = skeleton.get_input_embeddings().weight.numel()
    return Model(
        name=name,
        blocks=tuple(Block(tuple(found), cache, scores) for found in inside),
        around=tuple(around),
        hidden=settings.hidden_size,
        table=table,
        tied=bool(config.tie_word_embeddings),
        stored=4 if config.dtype is torch.float32 else 2,
    )


def _configuration(model: str) -> tuple[Any, str]:
    """The configuration of `model`, and what to call it; of a hub id nothing else is fetched."""
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if not path.exists() and not model.startswith((".", "/", "~")) and model.count("/") == 1:
        from huggingface_hub import hf_hub_download

        try:
            return source.read_config(Path(hf_hub_download(model, "config.json")).parent, {}), model
        except Exception as error:  # the hub client raises a dozen unrelated types
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(f"cannot fetch {model} from the hub: {why}") from None
    directory, arguments = source.locate(str(path))
    return source.read_config(directory, arguments), path.stem if arguments else directory.resolve().name


def _group(group: Found, settings: Any) -> Group:
    chosen = next((getattr(settings, key) for key in _CHOSEN if getattr(settings, key, None)), None)
    experts = group[0].parts if len(group[0].shape) == 3 else 1
    used = min(1.0, chosen / experts) if chosen and experts > 1 else 1.0
    return Group(tuple((m.rows, m.columns) for m in group), isinstance(group, Sum), used)


def _attention(settings: Any) -> tuple[int, int]:
    """`cache` and `scores` of a `Block`, as the configuration has them."""
    heads = settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return 2 * size * (getattr(settings, "num_key_value_heads", None) or heads), heads * size
