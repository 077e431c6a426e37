"""What people bring: whatever the files are, the split is of the model that Transformers loads, or of none."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from outputs import error, logits, protected
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from sliplm.engine.builtin import BuiltinEngine
from sliplm.errors import BundleError, SlipError, UnsupportedModelError
from sliplm.split import check, renaming
from sliplm.split.model import Options, Summary, split_model
from sliplm.split.source import fake_mode, open_source

pytestmark = pytest.mark.slow

DOWN = "model.layers.0.mlp.down_proj.weight"


def is_what_transformers_loads(directory: Path, out: Path, **options: Any) -> Summary:
    """Split, and compare with what `from_pretrained` makes of the directory."""
    done = split_model(str(directory), out, Options(rank=4), **options)
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    assert error(want, protected(out)) < 1e-3 and done.error is not None and done.error < 1e-3
    return done


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another save: the same names, other values."""
    return {name: t.roll(1, -1).contiguous() for name, t in state.items()}


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no memory for the original."""
    monkeypatch.setattr(check, "_sizes", lambda *_: (2, 0))
    monkeypatch.setattr(check, "available_memory", lambda: 1)


# Which files are the model (1)


def test_a_second_model_beside_it_is_left_aside_and_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(other(load_file(model / "model.safetensors")), model / "model_ema.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        is_what_transformers_loads(model, tmp_path / "out")
    assert "left aside" in caplog.text and "model_ema.safetensors" in caplog.text


def shards(model: Path, state: dict[str, torch.Tensor]) -> None:
    """An index beside the model and shards that it names."""
    save_file(state, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    where = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_single_file_goes_before_an_index_of_another_save(model: Path, tmp_path: Path) -> None:
    shards(model, other(load_file(model / "model.safetensors")))
    is_what_transformers_loads(model, tmp_path / "out")


def test_a_stale_index_does_not_hinder_a_fresh_file(model: Path, tmp_path: Path) -> None:
    shards(model, load_file(model / "model.safetensors"))
    (model / "model-00001-of-00001.safetensors").unlink()
    is_what_transformers_loads(model, tmp_path / "out")


def test_only_the_shards_of_the_index_count(model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    shards(model, state)
    (model / "model.safetensors").unlink()
    save_file(other(state), model / "model-00009-of-00009.safetensors", {"format": "pt"})
    is_what_transformers_loads(model, tmp_path / "out")


def test_other_names_are_no_model(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors.* only weights\.safetensors"):
        split_model(str(model), tmp_path / "out", Options(rank=4))


# Names that Transformers changes while it loads


def without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): t for name, t in state.items()}


def test_names_without_the_model_s_prefix(model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file(without_prefix(state), model / "model.safetensors", {"format": "pt"})
    is_what_transformers_loads(model, tmp_path / "out")


@pytest.mark.parametrize("names", [["norm.weight"], None], ids=["one", "all"])
def test_two_tensors_for_one_place_are_refused(
    names: list[str] | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All names of the model are there, and Transformers loads the others."""
    no_room(monkeypatch)
    state = load_file(model / "model.safetensors")
    second = without_prefix(other(state))
    save_file(state | {n: second[n] for n in names or second}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"which are both loaded as model\."):
        split_model(str(model), tmp_path / "out", Options(rank=4))


def test_a_tensor_that_is_converted_under_its_own_name_is_no_longer_itself(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    source = open_source(str(tiny))
    with fake_mode():
        skeleton = source.skeleton()
    assert not source.renamed(skeleton)
    change = WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(renaming, "get_model_conversion_mapping", lambda *_: [change])
    assert source.renamed(skeleton)


# Tied tensors that are both there and differ (2)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_of_a_tied_model(tmp_path: Path, same: bool) -> None:
    directory = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    state = load_file(directory / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"] = head if same else head.roll(1, 0).contiguous()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    is_what_transformers_loads(directory, tmp_path / "out")


# Classes (4) and code of the model's own (18)


def test_a_classifier_is_split_and_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = save_tiny(tmp_path / "text")
    config = transformers.AutoConfig.from_pretrained(text, num_labels=3, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=2))
    assert "LlamaForSequenceClassification does not continue text: `slip trusted` will not serve it" in caplog.text
    with pytest.raises(BundleError, match="LlamaForSequenceClassification, which does not continue text"):
        BuiltinEngine(tmp_path / "out" / "trusted")
    with pytest.raises(SlipError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "trusted")


def test_code_of_the_checkpoint_s_own_is_mentioned_or_refused(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        split_model(str(model), tmp_path / "out", Options(rank=4))
    assert "auto_map" in caplog.text and "LlamaForCausalLM" in caplog.text
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        split_model(str(model), tmp_path / "own", Options(rank=4))


def test_loading_without_sliplm_says_what_to_import(tiny_split: Path) -> None:
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tiny_split / 'trusted')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "import sliplm.trusted" in done.stderr


# Bases (5)


def test_a_base_that_is_the_model_is_refused(tiny: Path, model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file({n: t.to(torch.bfloat16) for n, t in state.items()}, model / "model.safetensors", {"format": "pt"})
    for base in (tiny, model):
        with pytest.raises(UnsupportedModelError, match="is this model itself"):
            split_model(str(model), tmp_path / "out", Options(rank=4, base=str(base)))


def test_added_tokens_do_not_hinder_a_base(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tuned.resize_token_embeddings(260)
    tuned.get_parameter(DOWN).data += 0.01 * torch.randn(60, 150)
    tuned.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=4, base=str(tiny)))
    assert "protected as without a base: lm_head.weight" in caplog.text
    assert error(logits(tuned), protected(tmp_path / "out")) < 1e-3


def test_another_model_is_no_base(tiny: Path, tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", hidden_size=72, head_dim=12)
    with pytest.raises(UnsupportedModelError, match="is not the base of this model"):
        split_model(str(wide), tmp_path / "out", Options(rank=4, base=str(tiny)))


# The check after the split (6)


def test_a_split_that_is_not_the_model_fails_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sliplm.split.source import SafetensorsSource

    honest = SafetensorsSource.read

    def other_matrix(self: Any, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        found = honest(self, name, part, parts)
        return found.roll(1, -1) if name == DOWN else found

    monkeypatch.setattr(SafetensorsSource, "read", other_matrix)
    with pytest.raises(BundleError, match="the protected model is not the original: its logits differ"):
        split_model(str(tiny), tmp_path / "out", Options(rank=4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("planes", [1, 2])
def test_the_error_is_what_the_planes_give(tiny: Path, tmp_path: Path, planes: int) -> None:
    done = split_model(str(tiny), tmp_path / "out", Options(rank=4, planes=planes))
    assert done.checked == "logits" and done.error is not None
    assert check.LIMITS[planes] / 1000 < done.error < check.LIMITS[planes] / 2


def test_without_room_for_the_original_each_matrix_is_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_room(monkeypatch)
    with caplog.at_level(logging.WARNING):
        done = split_model(str(tiny), tmp_path / "out", Options(rank=4))
    assert done.checked == "products" and done.error is not None and done.error < 1e-3
    assert "no memory to load the original" in caplog.text


# Types (12)


def test_an_unsupported_type_is_named_with_its_tensor(model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    state[DOWN] = state[DOWN].to(torch.int8)
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"{DOWN} is stored as torch.int8"):
        split_model(str(model), tmp_path / "out", Options(rank=4))


def test_fp8_with_block_scales_is_dequantised_as_transformers_does(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", hidden_size=384, head_dim=64, intermediate_size=256, attention_bias=False)
    state = load_file(directory / "model.safetensors")
    wanted = dict(state)
    for name in [n for n in state if n.endswith("_proj.weight")]:
        rows, columns = state[name].shape
        blocks = -(-rows // 128), -(-columns // 128)
        scale = 0.5 + torch.rand(blocks)
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        state[name] = (state[name] / wide).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
        wanted[name] = state[name].float() * wide
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    plain = save_tiny(tmp_path / "plain", hidden_size=384, head_dim=64, intermediate_size=256, attention_bias=False)
    save_file(wanted, plain / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (directory / "config.json").write_text(json.dumps(config))
    split_model(str(directory), tmp_path / "out", Options(rank=4))
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    assert error(want, protected(tmp_path / "out")) < 1e-3


def test_fp8_without_scales_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    state[DOWN] = state[DOWN].to(torch.float8_e4m3fn)
    save_file(state, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=DOWN.replace(".", r"\.")):
        split_model(str(model), tmp_path / "out", Options(rank=4))


# Names (15)


def test_the_model_s_name_is_stored(tiny: Path, tmp_path: Path) -> None:
    split_model(str(tiny), tmp_path / "a", Options(rank=4), name="acme/assistant")
    split_model(str(tiny), tmp_path / "b", Options(rank=4))
    found = [json.loads((tmp_path / d / "trusted" / "config.json").read_text()) for d in "ab"]
    assert [c["quantization_config"]["name"] for c in found] == ["acme/assistant", tiny.name]
    with pytest.raises(SlipError, match="a model's name has"):
        split_model(str(tiny), tmp_path / "c", Options(rank=4), name=" ")


def test_files_in_the_cache_of_a_control_group_are_no_memory_in_use(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("990000\n")
    (tmp_path / "memory.stat").write_text("anon 90000\nactive_file 400000\ninactive_file 500000\n")
    assert check.available_memory(tmp_path) == 910_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (check.available_memory(tmp_path) or 0) > 1_000_000  # the machine's
