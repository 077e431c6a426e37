"""A shorter way through the common decoder layer, for a decoding step: one token of each of B sequences.

A Transformers layer spends far longer in Python than in arithmetic when it has few tokens to work on. This module
gives layers of the Llama layout (RMS norm, rotary attention, gated MLP, two residuals) a second forward that does the
same in some twenty calls, each group's members taken from one array. The model around it stays Transformers' own, and
whatever the short way is not made for (several tokens of a sequence, masks with holes, gradients) goes the long way.
Sequences of different lengths are padded on the left: a mask then says where each begins. Attention is done here rather
than by torch because torch's second thread, waiting for more, would take the core that an edge on the same machine
computes on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.activations import SiLUActivation

from sliplm._core import native
from sliplm.trusted.cache import grow
from sliplm.trusted.group import ProtectedGroup
from sliplm.trusted.linear import ProtectedLinear

LAYOUTS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


def shorten(model: nn.Module) -> int:
    """Give every layer of `model` that has the common layout, its linear maps bound, the short way; how many."""
    count = 0
    if native is None:
        return count
    for layer in model.modules():
        if type(layer).__name__ in LAYOUTS and type(layer).__module__.startswith("transformers.models."):
            short = Short.of(layer)
            if short is not None:
                layer.forward = short
                count += 1
    return count


def _group(modules: list[nn.Module]) -> ProtectedGroup | None:
    """The group whose members are exactly `modules`, in this order."""
    found = [m._group if isinstance(m, ProtectedLinear) else None for m in modules]
    first = found[0]
    if not isinstance(first, ProtectedGroup) or len(first) != len(modules) or any(g is not first for g in found):
        return None
    return first if [m._member for m in modules] == list(range(len(modules))) else None


class Short:
    """The forward of one layer.

    Attributes:
        groups, size: of the layer's keys, as many heads of so many numbers.
    """

    def __init__(
        self, layer: Any, qkv: ProtectedGroup, o: ProtectedGroup, gate_up: ProtectedGroup, down: ProtectedGroup
    ) -> None:
        attention = layer.self_attn
        self._long = layer.forward
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._index = attention.layer_idx
        self.size: int = attention.head_dim
        self._scale = attention.scaling
        self._queries = attention.q_proj.out_features // self.size
        self._rotated = self._queries + attention.k_proj.out_features // self.size
        self.groups = self._rotated - self._queries
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._norms = [norm and _Norm(norm) for norm in norms]
        self._before, self._between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._act = layer.mlp.act_fn
        self._silu = type(self._act) in (nn.SiLU, SiLUActivation)

    @classmethod
    def of(cls, layer: Any) -> Short | None:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [
            _group([attention.q_proj, attention.k_proj, attention.v_proj]),
            _group([attention.o_proj]),
            _group([mlp.gate_proj, mlp.up_proj]),
            _group([mlp.down_proj]),
        ]
        return None if any(g is None for g in groups) else cls(layer, *groups)  # type: ignore[arg-type]

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        starts: NDArray[np.int64] | None = None
        short = (
            hidden_states.shape[1] == 1
            and past_key_values is not None
            and position_embeddings is not None
            and hidden_states.dtype == torch.float32
            and hidden_states.device.type == "cpu"
            and not torch.is_grad_enabled()
        )
        if short and attention_mask is not None:
            # All that the cache will give for this token must be in the mask.
            length, _ = past_key_values.get_mask_sizes(1, self._index)
            starts = _starts(attention_mask, (len(hidden_states), 1, 1, length))
            short = starts is not None
        if not short:
            return self._long(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        cos, sin = [t.numpy().reshape(-1, self.size) for t in position_embeddings]
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).numpy()
        y = self.rows(x, cos, sin, partial(self._cached, past_key_values, starts))
        return torch.from_numpy(y).view(hidden_states.shape)

    def rows(
        self,
        x: NDArray[np.float32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        attend: Callable[[NDArray[np.float32], NDArray[np.float32]], None],
    ) -> NDArray[np.float32]:
        """The layer for rows x (N, K) that see only what is `attend`'s to say: it is given their queries, keys and
        values side by side (N, H + 2 G, D), and writes what they see, (N, H, D). cos and sin (N, D), or (1, D), are
        the rotary embedding's."""
        assert native is not None  # or there would be no short way
        size = self.size
        heads = self._qkv.stacked(self._before(x)).reshape(len(x), -1, size)
        for norm, part in zip(self._norms, (slice(self._queries), slice(self._queries, self._rotated)), strict=True):
            if norm is not None:
                some = heads[:, part]
                some[:] = norm(some.reshape(-1, size)).reshape(some.shape)
        native.rotate(heads[:, : self._rotated], cos, sin)
        seen = np.empty((len(x), self._queries, size), np.float32)
        attend(heads, seen)
        x = x + self._o.stacked(seen.reshape(len(x), -1))
        x += self._down.stacked(self._gated(self._gate_up.stacked(self._between(x))))
        return x

    def _gated(self, both: NDArray[np.float32]) -> NDArray[np.float32]:
        """The activation of the first half of the columns, times the other half."""
        assert native is not None
        if not self._silu:
            gate, up = torch.from_numpy(both).chunk(2, dim=1)
            other: NDArray[np.float32] = (self._act(gate) * up).numpy()
            return other
        out = np.empty((len(both), both.shape[1] // 2), np.float32)
        native.gated(both, out)
        return out

    def _cached(
        self, cache: Any, starts: NDArray[np.int64] | None, heads: NDArray[np.float32], seen: NDArray[np.float32]
    ) -> None:
        assert native is not None
        new = torch.from_numpy(heads).unsqueeze(2)
        grow(cache, self._index)
        keys, values = cache.update(new[:, self._queries : self._rotated], new[:, self._rotated :], self._index)
        native.attend(heads[:, : self._queries], keys.numpy(), values.numpy(), starts, self._scale, seen)

    def ragged(self, sequences: Any, heads: NDArray[np.float32], seen: NDArray[np.float32]) -> None:
        """What `rows` wants to have called, for those of a `native.Ragged`."""
        sequences.attend(self._index, heads, self._scale, seen)


class _Norm:
    """A module's RMS norm. Calls of torch would take longer than the arithmetic."""

    def __init__(self, module: Any) -> None:
        self._module, self._epsilon = module, module.variance_epsilon
        self._address = 0
        self._weight = np.empty(0, np.float32)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        assert native is not None
        weight = self._module.weight
        if weight.data_ptr() != self._address:  # it was moved, or converted
            self._weight, self._address = weight.detach().numpy(), weight.data_ptr()
        out = np.empty((len(x), x.shape[1]), np.float32)
        native.rms_norm(x, self._weight, self._epsilon, out)
        return out


def _starts(mask: torch.Tensor, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Where the keys begin that each of B sequences sees, (B,), by the `mask` of a decoding step: of booleans, or of
    what is added to scores. None if one does not see all from there on, or if `shape`, (B, 1, 1, S), is another."""
    assert native is not None
    if mask.shape != shape:
        return None
    if mask.dtype != torch.bool:
        seen = mask == 0
        if not bool((seen | (mask == torch.finfo(mask.dtype).min)).all()):
            return None
        mask = seen
    starts = np.empty(len(mask), np.int64)
    return starts if native.first_seen(mask.flatten(1).numpy(), starts) else None
