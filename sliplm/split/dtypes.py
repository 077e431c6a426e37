"""The types of stored tensors: those that are read as they are, and fp8, which is turned into float32."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from sliplm.errors import UnsupportedModelError

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # what is appended to the weight's name; both multiply


def is_fp8(stored: str) -> bool:
    return stored in _FP8


def torch_dtype(name: str, stored: str) -> torch.dtype:
    """The type in which the tensor `name` is read; `stored` is safetensors' word. Raises UnsupportedModelError."""
    if is_fp8(stored):
        return torch.float32
    if stored not in _PLAIN:
        raise UnsupportedModelError(f"the tensor {name} is stored as {stored}, which is not supported.")
    return _PLAIN[stored]


def readable(settings: dict[str, Any]) -> bool:
    """Whether a `quantization_config` means fp8 weights with scales, which `dequantise` can turn back."""
    kind = settings.get("quant_method")
    return kind == "fp8" or (kind == "compressed-tensors" and settings.get("format") == "float-quantized")


def scale_of(name: str, names: Container[str], scaled: bool, stored: str) -> str | None:
    """The tensor that holds the scales of the fp8 tensor `name`; None if it has none.

    Raises:
        UnsupportedModelError: the configuration says that fp8 tensors are `scaled` and there are no scales, or not and
            there are: either way nobody knows what the numbers mean.
    """
    candidates = [name + suffix for suffix in _SCALES]
    if name.endswith(".weight"):
        candidates.append(name.removesuffix("weight") + "scale")  # DeepSeek-V4's, which Transformers reads as well
    found = next((c for c in candidates if c in names), None)
    if (found is not None) != scaled:
        why = "without scales" if scaled else "with scales of which the configuration says nothing"
        raise UnsupportedModelError(f"the tensor {name} is stored as {stored} {why}, which is not supported.")
    return found


def dequantise(name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 from fp8 `weight` (..., N, K) and its scales: one number, one per row (N, 1), or one per block
    (..., n, k). As for Transformers' `Fp8Dequantize`, a block has N/n rows and K/k columns.

    Raises:
        UnsupportedModelError: the scales' shape does not divide the weight's.
    """
    wide = weight.float()
    # Exponents alone (ue8m0) are stored as a type of their own or as bytes.
    factor = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() == 1:
        return wide * factor.reshape(())
    rows, columns = wide.shape[-2:]
    n, k = factor.shape[-2:] if factor.dim() >= 2 else (len(factor), 1)
    if rows % n or columns % k or factor.numel() * rows * columns != wide.numel() * n * k:
        raise UnsupportedModelError(
            f"the scales of the fp8 tensor {name} have shape {tuple(scale.shape)}, which does not divide its "
            f"shape {tuple(weight.shape)}."
        )
    blocks = wide.reshape(-1, n, rows // n, k, columns // k) * factor.reshape(-1, n, 1, k, 1)
    return blocks.reshape(wide.shape)
