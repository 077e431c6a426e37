"""Configurations and files that are no model: one sentence before any work, which names the file and what is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from outputs import error, logits, protected
from tiny import save_tiny

from sliplm.errors import UnsupportedModelError
from sliplm.split.model import Options, split_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def configure(model: Path, **changes: Any) -> Path:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return model


def refused(model: Path, says: str, **options: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        split_model(str(model), model.parent / "out", Options(rank=4), **options)
    assert "\n" not in str(caught.value) and "tokenizer" not in str(caught.value)
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "foo"}, r"no LlamaForCausalLM can be made of the configuration \(KeyError: 'foo'\)"),
        ({"dtype": "int8"}, "no LlamaForCausalLM can be made .*int8"),
        ({"hidden_size": "60"}, "the configuration of .* cannot be read: .*'hidden_size': .*expected int"),
        ({"tie_word_embeddings": None}, "the configuration of .* cannot be read: .*'tie_word_embeddings'"),
        ({"model_type": "zzz"}, "the configuration of .* cannot be read: .*`zzz`"),
        ({"quantization_config": {}}, r"already quantized \(its quantization_config names no method\)"),
        ({"quantization_config": {"load_in_8bit": True}}, r"already quantized \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        ({"quantization_config": "fp8"}, "quantiz"),
    ],
    ids=str,
)
def test_configurations(changes: dict[str, Any], says: str, model: Path) -> None:
    refused(configure(model, **changes), says)


@pytest.mark.parametrize("content", [b"[]", b"{", b"", b'"llama"'])
def test_what_is_no_configuration(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, "the configuration of .* cannot be read")


@pytest.mark.parametrize("file", ["model.safetensors", INDEX, "config.json", "chat_template.jinja"])
def test_a_pointer_in_the_place_of_a_file(file: str, model: Path) -> None:
    if file == INDEX:
        (model / "model.safetensors").unlink()
    (model / file).write_bytes(POINTER)
    refused(model, f"{file} is a pointer of Git LFS and not the file: run `git lfs pull` first")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_the_place_of_an_adapter(file: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    (tmp_path / "adapter" / file).write_bytes(POINTER)
    refused(model, f"{file} is a pointer of Git LFS", adapter=tmp_path / "adapter")


def test_an_unused_pointer_does_no_harm(model: Path, tmp_path: Path) -> None:
    (model / INDEX).write_bytes(POINTER)
    split_model(str(model), tmp_path / "out", Options(rank=4))


@pytest.mark.parametrize(
    "index", ["[]", "{}", "{", '{"metadata": {}, "weight_map": {}}', '{"metadata": {}, "weight_map": []}']
)
def test_what_is_no_index(index: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(index)
    refused(model, f"{INDEX} is damaged")


# The class of a model


@pytest.mark.parametrize(
    "named",
    ["LlamaForCausalLM", ["MistralForCausalLM"], ["LlamaConfig"], ["Trainer"], ["AutoModelForCausalLM"], [5], [], None],
    ids=str,
)
def test_the_class_is_transformers_choice(
    named: Any, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(model, architectures=named)
    with caplog.at_level(logging.WARNING):
        split_model(str(model), tmp_path / "out", Options(rank=4))
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32"))
    assert error(want, protected(tmp_path / "out")) < 1e-3
    other = isinstance(named, list) and named
    assert ("is split as LlamaForCausalLM" in caplog.text) == bool(other) and "has no class L:" not in caplog.text
    written = json.loads((tmp_path / "out" / "trusted" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_a_class_of_another_type_does_not_decide(tiny: Path, tmp_path: Path) -> None:
    """Transformers goes by `model_type`: this is a Mistral, whatever the list of classes says."""
    model = configure(save_tiny(tmp_path / "model", attention_bias=False), model_type="mistral", sliding_window=8)
    split_model(str(model), tmp_path / "out", Options(rank=4))
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32"))
    assert error(want, protected(tmp_path / "out")) < 1e-3
