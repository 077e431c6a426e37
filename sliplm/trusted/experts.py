"""A block of experts: each expert's two matrices are protected, and experts that get no token are not asked."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from sliplm.split.layers import expert_parameters
from sliplm.trusted.linear import ProtectedLinear


def protect_experts(experts: nn.Module, parts: list[ProtectedLinear]) -> nn.Module:
    """Turn `experts`, which follows Transformers' interface for experts, into a protected block.

    The module stays: its activation, its gate and further norms are the model's own. Its two three-dimensional
    parameters become lists of `parts` (the first matrices of all experts, then the second), and its loop is ours.
    """
    count = len(parts) // 2
    for key, own in zip(expert_parameters(experts), (parts[:count], parts[count:]), strict=True):
        for name in (key, f"{key}_bias"):
            experts._parameters.pop(name, None)
        experts.add_module(key, nn.ModuleList(own))
    experts._is_hf_initialized = True  # type: ignore[assignment] # or Transformers looks for the parameters
    experts.forward = MethodType(_forward, experts)  # type: ignore[method-assign]
    return experts


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states (tokens, width), the experts of each token and their weights (tokens, k) to (tokens, width)."""
    first, second = (getattr(self, key) for key in expert_parameters(self))
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= len(first):  # a mark for "none"
            continue
        token, slot = torch.where(top_k_index == expert)
        x = first[expert](hidden_states[token])
        x = second[expert](self._apply_gate(x) if self.has_gate else self.act_fn(x))
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        out.index_add_(0, token, (x * top_k_weights[token, slot, None]).to(out.dtype))
    return out
