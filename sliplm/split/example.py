"""Inputs for a trial run of a Transformers model, made from its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sliplm.errors import UnsupportedModelError

TOKENS = 4
IMAGE_SIDE = 224


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for `model`: a few tokens, or one picture, as its `main_input_name` says.

    Raises:
        UnsupportedModelError: the model says nothing, or wants something else.
    """
    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", "input_ids") if config is not None else None
    if kind == "input_ids":
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": ids.clone()}
        return {"input_ids": ids}
    if kind == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", IMAGE_SIDE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, getattr(vision, "num_channels", 3), height, width)}
    raise UnsupportedModelError(f"it is not known what {type(model).__name__} takes; give example inputs")
