"""Load a trusted bundle with `AutoModelForCausalLM.from_pretrained(DIR/trusted)`, through Transformers' own extension
point for quantization methods. Importing this module registers it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sliplm import bundle
from sliplm.errors import BundleError
from sliplm.split.groups import Group, Sum, protected_tensors
from sliplm.split.layers import members
from sliplm.split.matrices import group_layout, guard
from sliplm.split.open import masked_groups
from sliplm.split.plan import OpenPlan, Options, masked, read_open, read_plan
from sliplm.split.tensors import Layout
from sliplm.trusted.embedding import map_table
from sliplm.trusted.install import bind, install
from sliplm.trusted.open import place_runs


@register_quantization_config("slip")
class SlipConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a trusted bundle: the plan of the split (`split.plan`), its hardenings, what the model
    is called, whether it was `based` on a public one, and which blocks are `open`."""

    def __init__(
        self,
        plan: list[dict[str, Any]] | None = None,
        blinding: bool = True,
        camouflage: bool = True,
        name: str = "",
        based: bool = False,
        open: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "slip"  # type: ignore[assignment] # theirs are an enumeration
        self.plan, self.blinding, self.camouflage, self.name, self.based = plan or [], blinding, camouflage, name, based
        self.open = open

    def open_plan(self) -> OpenPlan | None:
        """Raises BundleError if it is damaged."""
        return read_open({"open": self.open})

    def groups(self, model: nn.Module) -> list[Group]:
        """The masked groups, their members as they are in `model`. Raises KeyError with the name of one that is not,
        and BundleError for a damaged plan."""
        return masked_groups(self.all_groups(model), read_plan({"plan": self.plan}))

    def all_groups(self, model: nn.Module) -> list[Group]:
        """Those of the other places, too."""
        known = {m.name: m for name, module in model.named_modules() for m in members(name, module)}
        groups = []
        for of in read_plan({"plan": self.plan}):
            group = tuple(known[name] for name in of.members)
            groups.append(Sum(group) if of.kind == "sum" else group)
        return groups


@register_quantizer("slip")
class SlipQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the protected layers before the weights load, and binds them to a runtime after.

    The loaded model carries the runtime as `model.slip`. It has no pads and no edge: `model.slip.attach(DIR/edge)`
    makes this process both, `model.slip.make_pads` and `model.slip.using(link)` are for servers.
    """

    quantization_config: SlipConfig
    requires_calibration = True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """As it is, but that the weights' file has its usual name: what a bundle says in its place is for those who do
        not have this quantizer. (Of the hooks that are given the configuration, the one before files are sought.)"""
        config.transformers_weights = None
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype is None else dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise BundleError("a trusted bundle is loaded from its directory.")
        self._directory = Path(checkpoint_files[0]).parent
        self._manifest = bundle.open_trusted(self._directory)
        try:
            groups = self.quantization_config.all_groups(model)
        except KeyError as error:
            raise BundleError(
                f"{type(model).__name__} has no layer {error}, which the bundle protects; {_load_it_as(model)}."
            ) from None
        settings = self.quantization_config
        plan = read_plan({"plan": settings.plan})
        empty = guard(groups, plan)
        self._groups = masked_groups(groups, plan)
        self._runs = place_runs(model, settings.open_plan())
        options = Options(camouflage=settings.camouflage, blinding=settings.blinding)
        layout: Layout = {}
        for group, of in zip(self._groups, masked(plan), strict=True):
            layout |= group_layout(group, of, options)
        file = self._directory / "model.safetensors"
        _check_layout(file, layout, model)
        self._own = set(layout)
        install(model, self._groups, {n: torch.empty(s, dtype=d, device="meta") for n, (d, s) in layout.items()})
        gone = protected_tensors(self._groups)
        for target, origin in list(model.all_tied_weights_keys.items()):
            if target in gone or origin in gone:
                del model.all_tied_weights_keys[target]
        _check_complete(file, model)
        self._table = map_table(model, model.all_tied_weights_keys)
        if self._table:
            name, table = self._table
            _check_layout(file, {name: (torch.float32, (table.num_embeddings, table.embedding_dim))}, model)
        # What is ours is read by `bind`, from the mapped file: no loader shall convert it, or copy all of it at once.
        unread = {empty, *self._own, *([self._table[0]] if self._table else [])}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^({'|'.join(map(re.escape, sorted(unread)))})$"}

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> list[Any]:
        """None: a bundle's tensors have the names that they have in the model."""
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        file = self._directory / "model.safetensors"
        with safe_open(file, "pt") as tensors:
            own = {name: tensors.get_tensor(name) for name in self._own}
        runtime = bind(model, self._groups, own, bytes.fromhex(self._manifest.edge_digest))
        runtime.open_runs(self._runs)
        if self._table:
            name, table = self._table
            with safe_open(file, "pt") as tensors:  # a mapping of its own: the other one's memory is let go of
                table.bind(tensors.get_tensor(name))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _check_layout(file: Path, layout: Layout, model: PreTrainedModel) -> None:
    """Raises BundleError if the tensors of `layout` are not in `file`, in their shapes; types may differ."""
    with safe_open(file, "pt") as tensors:
        stored = set(tensors.keys())
        for name, (_, shape) in layout.items():
            if name not in stored or tuple(tensors.get_slice(name).get_shape()) != shape:
                raise BundleError(
                    f"{file.parent} does not hold {name} as {type(model).__name__} has it: it was split by another "
                    f"version of this software, or as another class; split again, or {_load_it_as(model)}."
                )


def _check_complete(file: Path, model: PreTrainedModel) -> None:
    """Raises BundleError if `model` has tensors that the bundle lacks: Transformers would make them up."""
    with safe_open(file, "pt") as tensors:
        stored = set(tensors.keys())
    tied = model.all_tied_weights_keys
    known = stored | {name for pair in tied.items() for name in pair if stored & set(pair)}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = {name for name in model.state_dict() if name not in known and not any(p.search(name) for p in optional)}
    if missing:
        raise BundleError(
            f"{type(model).__name__} needs {min(missing)}, which the bundle does not hold; {_load_it_as(model)}."
        )


def _load_it_as(model: PreTrainedModel) -> str:
    return f"load it as {' or '.join(model.config.architectures or ['another class'])}"
