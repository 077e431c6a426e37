"""Merge a LoRA adapter, as PEFT saves it, into the model that it adapts, one tensor at a time and in float32.

W + scale B A, scale = alpha / r (or alpha / sqrt(r), rsLoRA); tensors that were trained whole (`modules_to_save`,
biases) replace the model's own. What is not known to be this, in the configuration or among the tensors, is refused.
Source: LoRA (arXiv 2106.09685), section 4; PEFT's checkpoint format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sliplm.errors import UnsupportedModelError
from sliplm.split.camouflage import trusted_rank
from sliplm.split.files import ADAPTER_CONFIG, adapter_config
from sliplm.split.layers import Member
from sliplm.split.source import Source

_WEIGHTS = "adapter_model.safetensors"
# Settings that the merging follows, or that say nothing about the merged weights.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "bias", "init_lora_weights", "lora_dropout", "inference_mode", "task_type", "auto_mapping"),
    *("base_model_name_or_path", "base_model_class", "parent_library", "revision", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("eva_config", "runtime_config", "qalora_group_size", "megatron_core", "loftq_config"),
}
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights, too


class Adapted(Source):
    """A model with an adapter merged into it. Tied tensors appear under every name, as the adapter may part them.

    Args:
        base: with the tensor names that the adapter's are made from. tied: target -> source.

    Attributes:
        rank: the largest among the adapter's matrices.

    Raises:
        UnsupportedModelError: the adapter is no LoRA that can be merged, or not one of this model.
    """

    def __init__(self, base: Source, adapter: Path, tied: Mapping[str, str]) -> None:
        self.config, self.origin = base.config, base.origin
        self._base = base
        own = base.names()
        self._at = {name: name for name in own} | {t: s for t, s in tied.items() if t not in own and s in own}
        self._settings = _settings(adapter)
        self._low: dict[str, dict[str, torch.Tensor]] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._tables: set[str] = set()
        for key, tensor in _tensors(adapter).items():
            self._sort_in(key, tensor, adapter)
        for name, pair in self._low.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise UnsupportedModelError(f"the adapter {adapter} lacks a part of what it adds to {name}.")
        if not self._low and not self._whole:
            raise UnsupportedModelError(f"the adapter {adapter} is empty.")
        self.rank = max((pair["A"].shape[0] for pair in self._low.values()), default=0)

    def names(self) -> set[str]:
        return set(self._at)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._changed(name) else self._base.dtype(self._at[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._whole[name].shape) if name in self._whole else self._base.shape(self._at[name])

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        if not self._changed(name):
            return self._base.read(self._at[name], part, parts)
        whole = self._whole[name] if name in self._whole else self._base.read(self._at[name])
        whole = whole.float()
        if name in self._low:
            whole = whole + self._delta(name, tuple(whole.shape))
        if not bool(torch.isfinite(whole).all()):
            raise UnsupportedModelError(f"the adapted weight {name} holds values that are not finite numbers.")
        size = whole.shape[0] // parts
        return whole if parts == 1 else whole[part * size : (part + 1) * size]

    def load(self) -> Any:
        model = self._base.load()
        for name in sorted({*self._low, *self._whole}) if model is not None else ():
            parent, _, leaf = name.rpartition(".")
            # A parameter of its own: the one that was there may be tied to another, which the adapter leaves alone.
            setattr(model.get_submodule(parent), leaf, nn.Parameter(self.read(name), requires_grad=False))
        return model

    def exceeding(self, groups: Iterable[Iterable[Member]], rank: int, camouflage: bool) -> list[str]:
        """A sentence if the trusted side, split at `rank` with a base, cannot take all that the adapter adds."""
        found = []
        for m in (m for group in groups for m in group if m.weight in self._low):
            room = trusted_rank(rank, m.rows, m.columns, camouflage)
            if self._low[m.weight]["A"].shape[0] > room:
                found.append(m.weight)
        if not found:
            return []
        return [
            f"the adapter has rank {self.rank}, and at --rank {rank} the trusted side takes less: the edge gets a part "
            f"of what it adds to {len(found)} matrices; split with a higher --rank to keep all of it."
        ]

    def _changed(self, name: str) -> bool:
        return name in self._low or name in self._whole

    def _sort_in(self, key: str, tensor: torch.Tensor, adapter: Path) -> None:
        name = key.removeprefix("base_model.model.")
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            module, embedding, side, _ = match.groups()
            name = f"{module}.weight"
            if embedding:  # (B A)^T is added to an embedding: its rows are the inputs
                side, tensor = "BA"["AB".index(side)], tensor.T
                self._tables.add(name)
            self._low.setdefault(name, {})[side] = tensor
        else:
            name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            self._whole[name] = tensor
        if name not in self._at:
            raise UnsupportedModelError(f"the adapter {adapter} has a tensor {key} that belongs to nothing here.")

    def _delta(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        a, b = (self._low[name][side].float() for side in "AB")
        rank, s = a.shape[0], self._settings
        module = name.removesuffix(".weight")
        alpha = next((v for k, v in s["alpha_pattern"].items() if re.match(rf"(.*\.)?({k})$", module)), s["lora_alpha"])
        product: torch.Tensor = b.flatten(1) @ a.flatten(1) * (alpha / (rank**0.5 if s["use_rslora"] else rank))
        if s["fan_in_fan_out"] and name not in self._tables:
            product = product.T
        if product.numel() != torch.Size(shape).numel() or (len(shape) == 2 and product.shape != shape):
            raise UnsupportedModelError(
                f"the adapter adds a matrix of shape {tuple(product.shape)} to {name} of shape {shape}."
            )
        return product.reshape(shape)


def _settings(adapter: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"use_rslora": False, "fan_in_fan_out": False, "alpha_pattern": {}}
    settings |= {key: value for key, value in adapter_config(adapter).items() if value is not None}
    kind = str(settings.get("peft_type", "of an unknown kind")).upper()
    if kind != "LORA":
        raise UnsupportedModelError(f"the adapter {adapter} is {kind}; only LoRA can be merged.")
    if unknown := sorted(key for key, value in settings.items() if value and key not in _KNOWN):
        raise UnsupportedModelError(f"the adapter {adapter} uses {unknown[0]}, which cannot be merged here.")
    if settings.get("init_lora_weights") not in _INITIAL:
        how = settings["init_lora_weights"]
        raise UnsupportedModelError(
            f"the adapter {adapter} began as {how!r}, which changes the base's weights; merge it with PEFT."
        )
    try:
        for pattern, alpha in {**settings["alpha_pattern"], "": settings["lora_alpha"]}.items():
            re.compile(pattern)
            float(alpha)
    except (KeyError, TypeError, ValueError, re.error):
        raise UnsupportedModelError(f"{adapter / ADAPTER_CONFIG} gives no usable lora_alpha.") from None
    return settings


def _tensors(adapter: Path) -> dict[str, torch.Tensor]:
    path = adapter / _WEIGHTS
    if not path.is_file():
        raise UnsupportedModelError(f"{adapter} holds no {_WEIGHTS} (pickled adapters are not read).")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(f"{path} is damaged or incomplete ({str(error).splitlines()[0]}).") from None
