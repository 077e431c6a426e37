"""What vLLM loads in each of its processes: the quantization method `slip`, and how vLLM has to run for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sliplm import bundle
from sliplm.engine.vllm.edges import Edges, making
from sliplm.engine.vllm.settings import Settings
from sliplm.errors import BundleError, SlipError

METHOD = "slip"

FOR_EVER = str(10**7)
"""Seconds. A step waits for an edge as long as it takes; vLLM would end the engine."""


def register() -> None:
    """The entry point `vllm.general_plugins`. May be called more than once."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import register_quantization_config

    from sliplm.engine.vllm.method import SlipConfig

    register_quantization_config(METHOD)(SlipConfig)
    original = EngineArgs.create_engine_config
    if getattr(original, "prepares", None) == METHOD:
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_bundle(Path(self.model)):
            prepare(self)
        return original(self, *args, **kwargs)

    create_engine_config.prepares = METHOD  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def is_bundle(directory: Path) -> bool:
    """Whether this is DIR/trusted, or says it is."""
    try:
        return bool(
            json.loads((directory / "config.json").read_bytes())["quantization_config"]["quant_method"] == METHOD
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def prepare(arguments: Any) -> None:
    """Set what a trusted bundle wants in vLLM's `EngineArgs`, and refuse what cannot be.

    Raises SlipError: of the arguments, the bundle or the environment, before anything was loaded.
    """
    _refuse(arguments)
    bundle.read_trusted_manifest(arguments.model)
    if making.get() is Edges:
        Settings.read(os.environ).check(arguments.model)
    if arguments.dtype == "auto":
        arguments.dtype = "float32"  # as the bundle says: texts equal those of the built-in engine
    arguments.enforce_eager = True  # an exchange cannot be a part of a compiled graph
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", FOR_EVER)
    # Threads of torch that are bound to a core, or that wait busily, would take it from the exchange's own threads.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _refuse(arguments: Any) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if (getattr(arguments, name, 1) or 1) > 1:
            raise SlipError(
                f"--{name.replace('_', '-')} has to be 1 for a trusted bundle: the heavy arithmetic is on edges, of "
                "which any number may connect."
            )
    if arguments.enable_lora:
        raise SlipError("a trusted bundle takes no --enable-lora: merge the adapter with `slip split --adapter`.")
    speculative = arguments.speculative_config
    if speculative is not None and (method := _method(speculative)) != "ngram":
        raise SlipError(f"with a trusted bundle, vLLM speculates by n-grams alone, not by {method!a}.")
    if arguments.load_format != "auto":
        raise BundleError("a trusted bundle is loaded with --load-format auto.")


def _method(speculative: Any) -> str:
    return str(speculative.get("method") if isinstance(speculative, dict) else getattr(speculative, "method", None))
