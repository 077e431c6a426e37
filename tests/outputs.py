"""What a model answers, and how far two answers are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from loading import attached


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


def error(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).std() / want.std())


def protected(out: Path) -> torch.Tensor:
    return logits(attached(transformers.AutoModelForCausalLM.from_pretrained(out / "trusted")))
