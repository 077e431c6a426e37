"""The quantization method `slip`: vLLM's linear layers take their weights from a trusted bundle, and call edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from sliplm.engine.vllm.layers import Layers, Part
from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.exchange.operator import Operator
from sliplm.split.plan import GroupPlan, read_plan

_SHARDS = {"q": 0, "k": 1, "v": 2}
_FLOATS = ("weight", "factor_a", "factor_b")


class SlipConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a trusted bundle, in vLLM."""

    def __init__(self, plan: list[GroupPlan], blinding: bool) -> None:
        super().__init__()
        self.plan, self.blinding = plan, blinding
        self.directory = Path()
        self.names = {name: name for group in plan for name in group.members}  # vLLM's: the bundle's
        self._layers: Layers | None = None

    def get_name(self) -> str:
        return "slip"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlipConfig:
        """Raises UnsupportedModelError for a plan with open or trusted blocks."""
        plan = read_plan(config)
        if any(group.place != "masked" for group in plan):
            raise UnsupportedModelError("vLLM runs splits of the plan all; `slip trusted` runs this one.")
        return cls(plan, bool(config.get("blinding", True)))

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        self.directory = Path(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.names = {hf_to_vllm_mapper.map_name(name) or name: own for name, own in self.names.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        parent, _, own = prefix.rpartition(".")
        names = [f"{parent}.{n}" if parent else n for n in self.packed_modules_mapping.get(own, [own])]
        protected = [self.names[name] for name in names if name in self.names]
        if isinstance(layer, LinearBase | ParallelLMHead) and protected:
            if len(protected) < len(names):
                raise UnsupportedModelError(f"{prefix} is protected in part, which vLLM cannot run.")
            if self._layers is None:  # in the process that holds the model, and in no other
                self._layers = Layers(self.directory, self.plan)
            return SlipLinearMethod(self._layers.claim(protected), self.blinding)
        if any(name.startswith(f"{prefix}.") for name in self.names) and not list(layer.children()) and prefix:
            raise UnsupportedModelError(f"{prefix} ({type(layer).__name__}) is protected, and vLLM cannot run it so.")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class SlipLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear map of vLLM's: one matrix, or several that it has fused."""

    def __init__(self, part: Part, blinding: bool) -> None:
        self._part = part
        self._blinding = blinding

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Empty parameters of the bundle's names, whose loaders keep what vLLM's loader reads."""
        rows = [layer.org_vocab_size] if isinstance(layer, ParallelLMHead) else output_partition_sizes
        self._part.expect(rows, input_size)
        kinds = {name: kind for name, (kind, _) in Operator.layout(1, 2, 2, self._blinding).items()}
        for name, kind in [*((name, torch.float32) for name in _FLOATS), *kinds.items()]:
            parameter = torch.nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _loader(self, key: str) -> Any:
        def load(_: Any, tensor: torch.Tensor, shard: str | int | None = None) -> None:
            self._part.take(_SHARDS[shard] if isinstance(shard, str) else shard or 0, key, tensor)

        return load

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._part.loaded()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self._part(x)
        return y if bias is None else y + bias

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """They are not: a protected head is in the bundle as one of its own, whatever the original has."""
        return layer

    def embedding(self, layer: torch.nn.Module, *_: Any) -> torch.Tensor:
        raise BundleError("a protected layer is no table to look up tokens in.")
