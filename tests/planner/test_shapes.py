"""Shapes from a configuration alone: the short way and Transformers' own agree, and no weights are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from zoo import FAMILIES, GROUPED

from sliplm.errors import UnsupportedModelError
from sliplm.planner import shapes
from sliplm.planner.traced import trace

KINDS = {"llama": tf.LlamaConfig, "mistral": tf.MistralConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config}
LARGE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 16}])
def test_both_ways_give_the_same_shapes(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    KINDS[kind](**GROUPED | changes, architectures=[shapes.LAYOUT[kind]]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    short = shapes.of_llama_layout(config, tmp_path.name)
    assert short is not None and short == trace(str(tmp_path))


def test_405_billion_weights_are_planned_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was made")

    for name in ("empty", "zeros", "randn"):
        monkeypatch.setattr(torch, name, refuse)
    large = shapes.read(str(write(tmp_path / "large", LARGE)))
    assert large.parameters == pytest.approx(405.85e9, rel=1e-4) and len(large.blocks) == 126
    assert large.blocks[0].groups[0].size == (16384 + 2 * 1024, 16384)


def test_other_architectures_are_traced_without_weights(tmp_path: Path) -> None:
    tf.GPT2Config(n_embd=8192, n_layer=96, n_head=64, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    large = shapes.read(str(tmp_path))  # 310 GB, were they there
    assert len(large.blocks) == 96 and large.parameters > 77e9
    assert [g.size for g in large.blocks[0].groups] == [(24576, 8192), (8192, 8192), (32768, 8192), (8192, 32768)]


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Phi (parallel blocks)", "GPT-2 (Conv1D)", "OPT"])
def test_groups_are_those_of_a_split(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path)
    found = trace(str(tmp_path))
    assert sum(len(b.groups) for b in found.blocks) + len(found.around) == family.round_trips


def test_experts_are_used_by_a_share_of_the_tokens(tmp_path: Path) -> None:
    FAMILIES["Mixtral"].make().save_pretrained(tmp_path)
    found = trace(str(tmp_path))
    shares = [group.used for group in found.blocks[0].groups]
    assert shares.count(0.5) == 8  # two of four experts, two matrices each


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 1 << 20}, "blocks"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        shapes.read(str(write(tmp_path / "m", LARGE | changes)))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config.json is "):
        shapes.read(str(tmp_path))


def test_what_is_no_model_that_continues_text(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot read"):
        shapes.read(str(tmp_path))
    tf.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not continue text"):
        shapes.read(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="is not a model"):
        shapes.read(str(tmp_path / "nothing"))
