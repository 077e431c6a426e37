"""What a checkpoint says of the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def said_base(directory: Path) -> str | None:
    """The public model that `directory` names as its origin: in the model card's `base_model`, in an adapter's
    `base_model_name_or_path`, or in the configuration's `_name_or_path`; None if it names none but itself."""
    found = [_card(directory / "README.md")]
    found += [_entry(directory / "adapter_config.json", "base_model_name_or_path")]
    found += [_entry(directory / "config.json", "_name_or_path")]
    own = {directory.name, str(directory), str(directory.resolve())}
    return next((name for name in found if name and name.rstrip("/") not in own), None)


def advice(base: str) -> str:
    """What it means for protection that a model is a fine-tune of `base`, in one sentence."""
    return (
        f"this model says that it was made from {base}: if that is public, a thief has it, too, and only the "
        f"difference is yours to hide. Split with --base {base}, which hides a LoRA completely; docs/security.md says "
        "what a full fine-tune loses either way."
    )


def _card(path: Path) -> str | None:
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard import metadata_load

    try:
        data: Any = ModelCardData(**(metadata_load(path) or {})).base_model
    except Exception:  # a card is for people, and may hold anything
        return None
    first = data[0] if isinstance(data, list) and data else data
    return first if isinstance(first, str) else None


def _entry(path: Path, key: str) -> str | None:
    try:
        value = json.loads(path.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None
