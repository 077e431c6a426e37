"""Which files of a directory are the model: those that the Transformers in use would load, and no others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sliplm.errors import UnsupportedModelError

try:
    from transformers.distributed.checkpoint import get_distributed_checkpoint_dir
except ImportError:  # before 5.20, Transformers has no such checkpoints

    def get_distributed_checkpoint_dir(*_: Any) -> None: ...  # type: ignore[misc]


logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
_LFS = b"version https://git-lfs"


def checkpoint_files(directory: Path, config: Any) -> list[Path]:
    """The safetensors files that hold the model in `directory`, in the order in which Transformers reads them: of
    tensors with one name, the last counts. One line of the log names the other safetensors.

    Transformers' own resolution decides (private, but its rules are what the owner's results come from): a file that
    the configuration names; else model.safetensors; else the shards that model.safetensors.index.json names.

    Raises:
        UnsupportedModelError: there are none, they are pickled, or one that the index names is missing.
    """
    where = str(directory)
    if get_distributed_checkpoint_dir(where, "", None, None) is not None:
        raise UnsupportedModelError(f"{directory} is a distributed training checkpoint; save it with save_pretrained.")
    chosen = getattr(config, "transformers_weights", None)
    what = directory / SAFE_WEIGHTS_INDEX_NAME if chosen is None else f"{directory}'s transformers_weights"
    try:
        names, _ = _get_resolved_checkpoint_files(where, None, None, None, None, False, chosen)
    except OSError:
        raise UnsupportedModelError(f"{directory} holds no {_expected()}{_only(_safetensors(directory))}.") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(what, Path):
            refuse_pointer(what)
        raise UnsupportedModelError(f"{what} is damaged ({type(error).__name__}).") from None
    if not names:
        raise UnsupportedModelError(f"{what} is damaged (it names no weights).")
    files = [Path(name) for name in names]
    files += [extra for name in getattr(type(config), "extra_files", ()) if (extra := directory / name).is_file()]
    for path in files:
        if not path.resolve().is_file() or not _inside(path, directory):
            raise UnsupportedModelError(f"{path} is missing; the checkpoint is incomplete.")
        if path.suffix != ".safetensors":
            raise UnsupportedModelError(
                f"{directory} holds no {_expected()}, and pickled checkpoints ({path.name}) are not read."
            )
    if aside := [name for name in _safetensors(directory) if directory / name not in files]:
        logger.warning("left aside, as Transformers leaves them: %s", ", ".join(aside))
    return files


def tensors_in(files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor. Raises UnsupportedModelError if one cannot be read."""
    where: dict[str, Path] = {}
    for path in files:
        refuse_pointer(path)
        try:
            with safe_open(path, "pt") as file:
                where.update((name, path) for name in file.keys())  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(f"{path} is damaged or incomplete ({str(error).splitlines()[0]}).") from None
    return where


def refuse_pointer(file: Path) -> None:
    """Raises UnsupportedModelError if a file is there and is only Git LFS's note of where its content is."""
    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(_LFS)) == _LFS
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnsupportedModelError(f"cannot read {file}: {error.strerror}.") from None
    if pointer:
        raise UnsupportedModelError(f"{file} is a pointer of Git LFS and not the file: run `git lfs pull` first.")


def has_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file()


def only_adapter(directory: Path) -> bool:
    """Whether the directory is an adapter without a model."""
    return has_adapter(directory) and not (directory / "config.json").is_file()


def adapter_config(directory: Path) -> dict[str, Any]:
    """Raises UnsupportedModelError."""
    refuse_pointer(directory / ADAPTER_CONFIG)
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{directory} is not an adapter: its {ADAPTER_CONFIG} is missing or damaged.")
    return config


def refuse_adapter(directory: Path) -> None:
    """Raises UnsupportedModelError if reading the model would drop an adapter: one beside it, or one alone."""
    if only_adapter(directory):
        base = adapter_config(directory).get("base_model_name_or_path")
        named = f" (it names {base})" if isinstance(base, str) and base else ""
        raise UnsupportedModelError(
            f"{directory} is an adapter, not a model: name the model that it adapts with --base{named}."
        )
    if has_adapter(directory):
        raise UnsupportedModelError(
            f"{directory} holds an adapter beside the model ({ADAPTER_CONFIG}): merge it with --adapter {directory}, "
            "or move its files away to have the model without it."
        )


def _safetensors(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("adapter_"))


def _inside(path: Path, directory: Path) -> bool:
    """Whether the index names it as a file below the directory (which a hub's cache may have made a link)."""
    return path.is_relative_to(directory) and ".." not in path.parts[len(directory.parts) :]


def _expected() -> str:
    return f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}"


def _only(others: list[str]) -> str:
    return f", which Transformers would load, only {', '.join(others)}" if others else ""
