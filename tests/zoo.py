"""One tiny model with random weights per family, and how far protection moves its logits.

`python tests/zoo.py` measures them all and prints the table of docs/models.md.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from loading import attached
from torch import nn

import sliplm
import sliplm.trusted
from sliplm.split.model import Options, split_model

RANK = 4
KEPT = {"CNN": ["depthwise (Conv2d)"], "MLP": []}
SHAPE = {
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 150,
    "vocab_size": 257,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 256,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 10}
EXPERTS = GROUPED | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 72}  # the originals' kernels want 16 bytes
CAUSAL = tf.AutoModelForCausalLM


@dataclass(frozen=True)
class Family:
    """A model of the family, the Auto class that loads its bundle, and the round trips of one forward pass."""

    make: Callable[[], Any]
    auto: Any = CAUSAL
    round_trips: int | None = None


def _of(config: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: config(**settings)


def _resnet() -> Any:
    return tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48], depths=[1, 2], layer_type="bottleneck", num_labels=10
    )


def _mobilenet() -> Any:
    return tf.MobileNetV2Config(image_size=64, depth_multiplier=0.5, num_labels=30)


FAMILIES = {
    # Four round trips per block, and one for the head. Parallel blocks take two, or three with two norms.
    "Llama": Family(_of(tf.LlamaConfig, **GROUPED), round_trips=9),
    "Mistral": Family(_of(tf.MistralConfig, **GROUPED, sliding_window=16), round_trips=9),
    "Qwen2": Family(_of(tf.Qwen2Config, **GROUPED, tie_word_embeddings=True), round_trips=9),
    "Qwen3": Family(_of(tf.Qwen3Config, **GROUPED), round_trips=9),
    "Gemma 2": Family(_of(tf.Gemma2Config, **GROUPED, query_pre_attn_scalar=10, sliding_window=16), round_trips=9),
    "Gemma 3": Family(_of(tf.Gemma3TextConfig, **GROUPED, query_pre_attn_scalar=10, sliding_window=16), round_trips=9),
    "Phi (parallel blocks)": Family(_of(tf.PhiConfig, **SHAPE, partial_rotary_factor=0.4), round_trips=5),
    "Phi-3 (fused qkv, gate-up)": Family(_of(tf.Phi3Config, **SHAPE), round_trips=9),
    "GPT-2 (Conv1D)": Family(
        _of(
            tf.GPT2Config,
            vocab_size=257,
            n_embd=60,
            n_layer=2,
            n_head=6,
            n_positions=128,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=256,
        ),
        round_trips=9,
    ),
    "GPT-NeoX (parallel blocks)": Family(_of(tf.GPTNeoXConfig, **SHAPE), round_trips=7),
    "OPT": Family(
        _of(
            tf.OPTConfig,
            vocab_size=257,
            hidden_size=60,
            num_hidden_layers=2,
            num_attention_heads=6,
            ffn_dim=150,
            max_position_embeddings=128,
            init_std=0.15,
            word_embed_proj_dim=40,
            eos_token_id=256,
        ),
        round_trips=11,
    ),
    "OLMo 2": Family(_of(tf.Olmo2Config, **GROUPED), round_trips=9),
    "Mixtral": Family(_of(tf.MixtralConfig, **EXPERTS, num_local_experts=4)),
    "Qwen3-MoE": Family(
        _of(tf.Qwen3MoeConfig, **EXPERTS, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40)
    ),
    "gpt-oss (biased, interleaved experts)": Family(
        _of(
            tf.GptOssConfig,
            **EXPERTS,
            num_local_experts=4,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"rope_type": "default"},
        )
    ),
    "BERT": Family(_of(tf.BertConfig, **SHAPE), tf.AutoModelForMaskedLM, round_trips=10),
    "T5": Family(
        _of(
            tf.T5Config,
            vocab_size=257,
            d_model=60,
            d_kv=10,
            num_heads=6,
            d_ff=150,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            initializer_factor=1.0,
            decoder_start_token_id=0,
        ),
        tf.AutoModelForSeq2SeqLM,
    ),
    "ViT": Family(
        _of(
            tf.ViTConfig,
            hidden_size=60,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=150,
            image_size=32,
            patch_size=8,
            num_labels=30,
            initializer_range=0.15,
        ),
        tf.AutoModelForImageClassification,
        round_trips=10,
    ),
    "ResNet": Family(_resnet, tf.AutoModelForImageClassification),
    "MobileNetV2 (depthwise)": Family(_mobilenet, tf.AutoModelForImageClassification),
}


def build(family: Family) -> Any:
    """The float32 model, with biases and norms that are not their initial zeros and ones."""
    torch.manual_seed(0)
    model = family.auto.from_config(family.make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model


def halves(family: Family, where: Path) -> tuple[Any, Any]:
    """The original and the protected model, which went through files."""
    model = build(family)
    model.save_pretrained(where / "model")
    split_model(str(where / "model"), where / "out", Options(RANK))
    return model, attached(family.auto.from_pretrained(where / "out" / "trusted"))


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 64)
        return {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    ids = torch.randint(3, 250, (2, 24), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :9]}
    return {"input_ids": ids}


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Root-mean-square error relative to the standard deviation of `want`."""
    return float((want - got.float()).square().mean().sqrt() / want.std())


def bfloat16_error(model: nn.Module, inputs: dict[str, torch.Tensor], want: torch.Tensor) -> float:
    half = copy.deepcopy(model).to(torch.bfloat16)
    cast = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    return relative_error(want, half(**cast).logits)


class Cnn(nn.Module):
    """Strided, dilated, grouped and depthwise convolutions, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=24)
        self.pointwise = nn.Conv2d(24, 40, 1, bias=False)
        self.grouped = nn.Conv2d(40, 60, 3, groups=2, padding="same")
        self.norm = nn.BatchNorm2d(60)
        self.head = nn.Linear(60, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.norm(self.grouped(x))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(33, 77), nn.ReLU(), nn.Linear(77, 77), nn.GELU(), nn.Linear(77, 20))


def main() -> None:
    tf.utils.logging.set_verbosity_error()
    print("| family | groups | matrices | stays on the trusted side | protected | bfloat16 | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            model = build(family)
            model.save_pretrained(f"{scratch}/model")
            summary = split_model(f"{scratch}/model", Path(scratch) / "out", Options(RANK))
            protected = attached(family.auto.from_pretrained(f"{scratch}/out/trusted"))
            inputs = inputs_for(model)
            want = model(**inputs).logits
            ours, theirs = relative_error(want, protected(**inputs).logits), bfloat16_error(model, inputs, want)
        row(name, summary.groups, summary.layers, summary.kept, ours, theirs)
    torch.manual_seed(0)
    for name, plain, x in (("CNN", Cnn().eval(), torch.randn(4, 3, 32, 32)), ("MLP", mlp(), torch.randn(64, 33))):
        with torch.no_grad():
            want = plain(x)
            theirs = relative_error(want, copy.deepcopy(plain).to(torch.bfloat16)(x.to(torch.bfloat16)))
            protected = sliplm.protect(plain, x, rank=RANK)
            groups = len(protected.slip.shapes)
            row(name, groups, groups, sorted(KEPT[name]), relative_error(want, protected(x)), theirs)


def row(name: str, groups: int, layers: int, kept: list[str], ours: float, theirs: float) -> None:
    kinds = sorted({k.split("(")[1].rstrip(")") for k in kept})
    assert math.isfinite(ours)
    cells = [name, groups, layers, ", ".join(kinds) or "-", f"{ours:.1e}", f"{theirs:.1e}", f"{theirs / ours:.0f}"]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
