"""Which extra of this package brings what an edge can do without, and the sentence that says so."""

from __future__ import annotations

import importlib

from sliplm.errors import SlipError

_TRUSTED = (
    "accelerate",
    "alembic",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "safetensors",
    "sqlalchemy",
    "tokenizers",
    "torch",
    "transformers",
)
EXTRAS = {  # extra: what it brings, for people; the modules
    "trusted": ("the trusted side's packages", _TRUSTED),
    "open": ("torch and Transformers", ("safetensors", "torch", "transformers")),
    "postgres": ("the package psycopg", ("psycopg",)),
    "vllm": ("vLLM, in an environment of its own", ("vllm",)),
    "tasks": ("the package lm-eval", ("lm_eval",)),
    "attack": ("scipy and matplotlib", ("matplotlib", "scipy")),
}


def advice(module: str | None, who: str) -> str | None:
    """How `who` ("`slip split`") gets the module that was not found; None if no extra brings it."""
    package = (module or "").partition(".")[0]
    for extra, (what, modules) in EXTRAS.items():
        if package in modules:
            return f"{who} needs {what}: pip install 'sliplm[{extra}]'."
    return None


def require(module: str, who: str) -> None:
    """Raise SlipError, before `who` begins with anything, if `module` cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise SlipError(advice(module, who) or f"{who} needs the package {module}.") from None
