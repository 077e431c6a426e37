"""Models whose code does more with a layer than to call it: they work, or they are refused at the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from outputs import error, logits, protected
from tiny import save_tiny
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import sliplm
from sliplm.errors import SlipError, UnsupportedModelError
from sliplm.split import check
from sliplm.split.model import Options, split_model


def test_a_bias_can_be_read(tmp_path: Path) -> None:
    """Jamba subtracts it from what the layer gives."""
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
    torch.manual_seed(0)
    model = transformers.JambaForCausalLM(transformers.JambaConfig(**sizes, **heads, **mamba, pad_token_id=0))
    model.save_pretrained(tmp_path / "model")
    done = split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=4))
    assert done.checked == "logits"
    assert error(logits(model), protected(tmp_path / "out")) < 1e-3


class Reads(nn.Module):
    """Uses its layers' biases twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.bare = nn.Linear(30, 40), nn.Conv1d(40, 24, 3), nn.Linear(24, 20, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.bare.bias is None
        x = self.linear(x) - self.linear.bias
        x = self.conv(x.mT) - self.conv.bias[:, None]
        return self.bare(x.mT)


def test_biases_follow_the_model_s_type_and_are_no_part_of_its_state() -> None:
    model, x = Reads().eval(), torch.randn(2, 9, 30)
    with torch.no_grad():
        want = model(x)
        guarded = sliplm.protect(model, x, rank=4)
        assert float((guarded(x) - want).norm() / want.norm()) < 1e-3
        assert not any("bias" in name for name in guarded.state_dict())
        assert guarded.to(torch.bfloat16).linear.bias.dtype == torch.bfloat16
        with pytest.raises(AttributeError, match="cannot be replaced"):
            guarded.linear.bias = None


def by_its_weight(self: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def by_its_parameters(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * len(self.down_proj._parameters["weight"])


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (by_its_weight, r"computes with the weight of model\.layers\.0\.mlp\.down_proj itself"),
        (by_its_parameters, r"the protected model does not run \(KeyError in .*, line \d+\)"),
    ],
)
def test_a_use_that_cannot_be_protected_is_refused(
    forward: Any, says: str, memory: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    if not memory:
        no_room(monkeypatch)
    with pytest.raises(SlipError, match=says):
        split_model(str(tiny), tmp_path / "out", Options(rank=4))
    assert not (tmp_path / "out").exists()


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no memory for the original."""
    monkeypatch.setattr(check, "_sizes", lambda *_: (2, 0))
    monkeypatch.setattr(check, "available_memory", lambda: 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: nn.functional.linear(x, w),
        lambda x, w: nn.functional.linear(x, w, torch.zeros(40)),
        lambda x, w: x @ w.T,
        lambda x, w: nn.functional.linear(x, w.float().chunk(2)[0]),
        lambda x, w: torch.einsum("bk,nk->bn", x, w),
        lambda x, w: nn.functional.linear(x, nn.Parameter(w.data, requires_grad=False)),
    ],
)
def test_a_weight_without_values_is_never_computed_with(use: Any) -> None:
    """Torch itself takes some of these, and gives whatever is in its memory."""
    guarded = sliplm.protect(nn.Sequential(nn.Linear(30, 40)), torch.randn(2, 30), rank=4)
    weight = guarded[0].weight
    assert weight.shape == (40, 30) and weight.dtype == torch.float32 and weight.is_meta
    with pytest.raises(UnsupportedModelError, match="computes with the weight of 0 itself"):
        use(torch.randn(2, 30), weight)


def test_without_memory_a_model_that_nobody_can_try_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its code takes more than the inputs that we can think of."""
    model = save_tiny(tmp_path / "model")
    own = transformers.LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, *, needed: Any, **kwargs: Any) -> Any:
        return own(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    no_room(monkeypatch)
    assert split_model(str(model), tmp_path / "out", Options(rank=4)).checked == "products"
    assert "was not tried (TypeError)" in caplog.text
