"""Load a trusted bundle with `AutoModelForCausalLM.from_pretrained(DIR/trusted)`, through Transformers' own extension
point for quantization methods. Importing this module registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sliplm import bundle, kernels
from sliplm.edge.engine import EdgeEngine
from sliplm.errors import BundleError
from sliplm.protocol.link import InProcessLink
from sliplm.split.blinding import Rotation
from sliplm.split.groups import Member, as_member
from sliplm.split.split import Options, group_layout
from sliplm.trusted.group import Group, MemberWeights
from sliplm.trusted.linear import ProtectedLinear
from sliplm.trusted.runtime import Runtime


@register_quantization_config("slip")
class SlipConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a trusted bundle: how it was split, and the names of each group's members."""

    def __init__(
        self, planes: int, rank: int, blinding: bool, camouflage: bool, groups: list[list[str]], **_: Any
    ) -> None:
        self.quant_method = "slip"
        self.planes, self.rank, self.blinding, self.camouflage = planes, rank, blinding, camouflage
        self.groups = groups

    @property
    def options(self) -> Options:
        return Options(self.rank, self.planes, self.camouflage, self.blinding)


@register_quantizer("slip")
class SlipQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the protected layers before the weights load, and binds them to a runtime after.

    The loaded model carries the runtime as `model.slip`; exchanges go to an edge in the same process unless
    `model.slip.using(link)` says otherwise.
    """

    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype is None else dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise BundleError("a trusted bundle is loaded from its directory.")
        self._directory = Path(checkpoint_files[0]).parent
        self._manifest = bundle.open_trusted(self._directory)
        self._members = [
            tuple(as_member(name, model.get_submodule(name)) for name in names)
            for names in self.quantization_config.groups
        ]
        # Whatever dtype the model is asked to be: these few tensors carry the precision.
        strict = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = strict | {"factor_a", "factor_b", "scales", "row_norm"}
        for group in self._members:
            layout = group_layout(group, self.quantization_config.options)
            for m in group:
                prefix = f"{m.name}."
                tensors = {
                    name.removeprefix(prefix): torch.empty(shape, dtype=dtype, device="meta")
                    for name, (dtype, shape) in layout.items()
                    if name.startswith(prefix) and "." not in name.removeprefix(prefix)
                }
                model.set_submodule(m.name, ProtectedLinear(m.columns, m.rows, tensors))
                model.all_tied_weights_keys.pop(f"{m.name}.weight", None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        shapes = [
            (self.quantization_config.planes * sum(m.rows for m in group), group[0].columns) for group in self._members
        ]
        q = bundle.QFile(self._directory / bundle.Q_FILE, shapes)
        raw = [q.matrix(g) for g in range(len(shapes))]
        matrices = [kernels.prepare(array) for array in raw]
        digest = bytes.fromhex(self._manifest.edge_digest)
        runtime = Runtime(matrices, raw, digest, InProcessLink(EdgeEngine(matrices, digest)))
        for number, group in enumerate(self._members):
            bind_group(model, number, group, runtime)
        model.slip = runtime
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def bind_group(model: nn.Module, number: int, members: tuple[Member, ...], runtime: Runtime) -> None:
    """Move the loaded tensors of one group out of the modules and into a `Group` of `runtime`."""
    modules = [model.get_submodule(m.name) for m in members]
    # Copies: the loader's tensors are views of a mapped file.
    tensors = [
        {name: t.detach().clone().float() if t.is_floating_point() else t for name, t in module.named_buffers()}
        for module in modules
    ]
    shared = tensors[0]
    rotations = tuple(
        Rotation(shared[f"{side}_perm"].numpy(), shared[f"{side}_sign"].numpy()) if f"{side}_perm" in shared else None
        for side in ("in", "out")
    )
    weights = [
        MemberWeights(m.name, t["factor_a"], t["factor_b"], t.get("bias"))
        for m, t in zip(members, tensors, strict=True)
    ]
    group = Group(
        number, weights, shared["scales"].numpy(), float(shared["row_norm"]), (rotations[0], rotations[1]), runtime
    )
    for i, module in enumerate(modules):
        assert isinstance(module, ProtectedLinear)
        module.bind(group, i)
