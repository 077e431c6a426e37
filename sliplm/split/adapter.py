"""Merge a LoRA adapter, as PEFT saves it, into the model that it adapts, one tensor at a time and in float32.

W + scale B A, scale = alpha / r (or alpha / sqrt(r), rsLoRA); tensors that were trained whole (`modules_to_save`,
biases) replace the model's own. What is not known to be this, in the configuration or among the tensors, is refused.
Source: LoRA (arXiv 2106.09685), section 4; PEFT's checkpoint format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from sliplm.errors import UnsupportedModelError
from sliplm.split.camouflage import trusted_rank
from sliplm.split.files import ADAPTER_CONFIG, adapter_config, refuse_pointer
from sliplm.split.layers import Member
from sliplm.split.plan import GroupPlan
from sliplm.split.source import Source
from sliplm.split.tensors import token_table

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


class Lora:
    """What an adapter holds.

    Attributes:
        path: its directory.
        low: name of a weight -> the factors "A" and "B" of what is added to it.
        whole: name -> the tensor that takes the place of the model's own.
        rank: the largest among the factors.

    Raises:
        UnsupportedModelError: it is damaged, or no LoRA that can be merged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = _settings(path)
        self.low: dict[str, dict[str, torch.Tensor]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        self._tables: set[str] = set()
        for key, tensor in _tensors(path).items():
            self._sort_in(key.removeprefix("base_model.model."), tensor)
        for name, pair in self.low.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise UnsupportedModelError(f"the adapter {path} lacks a part of what it adds to {name}.")
        if not self.low and not self.whole:
            raise UnsupportedModelError(f"the adapter {path} is empty.")
        self.rank = max((pair["A"].shape[0] for pair in self.low.values()), default=0)

    def names(self) -> set[str]:
        """Of the tensors that it changes."""
        return {*self.low, *self.whole}

    def vocabulary(self, model: nn.Module) -> int | None:
        """How many tokens the adapted `model` has, where the adapter brings another number of them than it has."""
        name, rows = token_table(model)
        brought = self.whole.get(f"{name}.weight")
        return len(brought) if brought is not None and len(brought) != rows else None

    def delta(self, name: str, shape: tuple[int, ...], transposed: bool) -> torch.Tensor:
        """What is added to the weight `name` of this shape, of a layer that stores its matrix `transposed` or not.
        (The adapter says fan_in_fan_out, too, but for one of its layers only: PEFT itself goes by the class of each.)

        Raises:
            UnsupportedModelError: it has another shape.
        """
        a, b = (self.low[name][side].float() for side in "AB")
        rank, s = a.shape[0], self._settings
        module = name.removesuffix(".weight")
        alpha = next((v for k, v in s["alpha_pattern"].items() if re.match(rf"(.*\.)?({k})$", module)), s["lora_alpha"])
        product: torch.Tensor = b.flatten(1) @ a.flatten(1) * (alpha / (rank**0.5 if s["use_rslora"] else rank))
        if transposed and name not in self._tables:
            product = product.T
        if product.numel() != torch.Size(shape).numel() or (len(shape) == 2 and product.shape != shape):
            raise UnsupportedModelError(
                f"the adapter adds a matrix of shape {tuple(product.shape)} to {name} of shape {shape}."
            )
        return product.reshape(shape)

    def _sort_in(self, name: str, tensor: torch.Tensor) -> None:
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            module, embedding, side, _ = match.groups()
            name = f"{module}.weight"
            if embedding:  # (B A)^T is added to an embedding: its rows are the inputs
                side, tensor = "BA"["AB".index(side)], tensor.T
                self._tables.add(name)
            self.low.setdefault(name, {})[side] = tensor
        elif ".original_module." not in name:  # the untrained copy of a module that was trained whole
            self.whole[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor


class Adapted(Source):
    """A model with an adapter merged into it. Tied tensors appear under every name, as the adapter may part them.

    Args:
        base: with the tensor names that the adapter's are made from. model: what the two make, for its configuration
            and the classes of its layers. tied: target -> source.

    Raises:
        UnsupportedModelError: the adapter is not one of this model.
    """

    def __init__(self, base: Source, lora: Lora, model: Any, tied: Mapping[str, str]) -> None:
        self.config, self.origin = model.config, base.origin
        self._base, self._lora = base, lora
        own = base.names()
        self._at = {name: name for name in own} | {t: s for t, s in tied.items() if t not in own and s in own}
        self._transposed = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
        if strange := lora.names() - self._at.keys():
            raise UnsupportedModelError(f"the adapter {lora.path} changes {min(strange)}, which this model lacks.")
        for name, wanted in model.state_dict().items():
            if name in self._at and self.shape(name) != (shape := tuple(wanted.shape)):
                raise UnsupportedModelError(
                    f"with the adapter {lora.path} the model needs {name} of shape {shape}, and neither of the two has "
                    "it: merge them with PEFT."
                )

    def names(self) -> set[str]:
        return set(self._at)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._changed(name) else self._base.dtype(self._at[name])

    def shape(self, name: str) -> tuple[int, ...]:
        whole = self._lora.whole.get(name)
        return self._base.shape(self._at[name]) if whole is None else tuple(whole.shape)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        if not self._changed(name):
            return self._base.read(self._at[name], part, parts)
        whole = self._lora.whole[name] if name in self._lora.whole else self._base.read(self._at[name])
        whole = whole.float()
        if name in self._lora.low:
            whole = whole + self._lora.delta(name, tuple(whole.shape), name in self._transposed)
        if not bool(torch.isfinite(whole).all()):
            raise UnsupportedModelError(f"the adapted weight {name} holds values that are not finite numbers.")
        size = whole.shape[0] // parts
        return whole if parts == 1 else whole[part * size : (part + 1) * size]

    def load(self) -> Any:
        model = self._base.load()
        for name in sorted(self._lora.names()) if model is not None else ():
            parent, _, leaf = name.rpartition(".")
            # A parameter of its own: the one that was there may be tied to another, which the adapter leaves alone.
            setattr(model.get_submodule(parent), leaf, nn.Parameter(self.read(name), requires_grad=False))
        return model

    def exceeding(self, groups: Sequence[Iterable[Member]], plan: Sequence[GroupPlan], camouflage: bool) -> list[str]:
        """A sentence if the trusted side, split by `plan` with a base, cannot take all that the adapter adds."""
        found, ranks = [], set()
        for group, of in zip(groups, plan, strict=True):
            for m in (m for m in group if m.weight in self._lora.low):
                if self._lora.low[m.weight]["A"].shape[0] > trusted_rank(of.rank, m.rows, m.columns, camouflage):
                    found.append(m.weight)
                    ranks.add(of.rank)
        if not found:
            return []
        split_at = ", ".join(map(str, sorted(ranks)))
        return [
            f"the adapter has rank {self._lora.rank}, and at --rank {split_at} the trusted side takes less: the edge "
            f"gets a part of what it adds to {len(found)} matrices; split with a higher --rank to keep all of it."
        ]

    def _changed(self, name: str) -> bool:
        return name in self._lora.low or name in self._lora.whole


def _settings(adapter: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"use_rslora": False, "alpha_pattern": {}}
    settings |= {key: value for key, value in adapter_config(adapter).items() if value is not None}
    kind = settings.get("peft_type")
    if kind is None:
        raise UnsupportedModelError(f"the adapter {adapter} says no peft_type; only LoRA can be merged.")
    if str(kind).upper() != "LORA":
        raise UnsupportedModelError(f"the adapter {adapter} is {kind}; only LoRA can be merged.")
    if unknown := sorted(key for key, value in settings.items() if value and key not in _KNOWN):
        raise UnsupportedModelError(f"the adapter {adapter} uses {unknown[0]}, which cannot be merged here.")
    if settings.get("init_lora_weights") not in _INITIAL:
        how = settings["init_lora_weights"]
        raise UnsupportedModelError(
            f"the adapter {adapter} began as {how!r}, which changes the base's weights; merge it with PEFT."
        )
    try:
        usable = all(_is_number(alpha) for alpha in (settings.get("lora_alpha"), *settings["alpha_pattern"].values()))
        for pattern in settings["alpha_pattern"]:
            re.compile(pattern)
    except (AttributeError, TypeError, re.error):
        usable = False
    if not usable:
        raise UnsupportedModelError(f"{adapter / ADAPTER_CONFIG} gives no usable lora_alpha.")
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _tensors(adapter: Path) -> dict[str, torch.Tensor]:
    path = adapter / _WEIGHTS
    if not path.is_file():
        raise UnsupportedModelError(f"{adapter} holds no {_WEIGHTS} (pickled adapters are not read).")
    refuse_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(f"{path} is damaged or incomplete ({str(error).splitlines()[0]}).") from None
