"""Adapters: the split is of the model that PEFT makes of the two, or of none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from outputs import error, logits, protected
from tiny import byte_tokenizer, save_tiny

from sliplm.errors import UnsupportedModelError
from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow


@pytest.fixture
def adapted(tiny: Path, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    def make(base: Path = tiny, tokens: int | None = None, **settings: Any) -> tuple[Path, torch.Tensor]:
        """An adapter as PEFT saves it, of a model with so many tokens, and the logits that PEFT has with it."""
        given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
        tuned = peft.get_peft_model(original(base, tokens), peft.LoraConfig(task_type="CAUSAL_LM", **given))
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        tuned.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(
            peft.PeftModel.from_pretrained(original(base, tokens), tmp_path / "adapter")
        )

    return make


def original(base: Path, tokens: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tokens)
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D, whose matrices are stored the other way round, and a head that is nn.Linear."""
    settings = {"n_embd": 60, "n_layer": 2, "n_head": 6, "n_positions": 128, "initializer_range": 0.2}
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt2") / "model"
    config = transformers.GPT2Config(vocab_size=257, bos_token_id=256, eos_token_id=256, **settings)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 24}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "bias": "none"},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "all-linear"],
)
def test_an_adapter_is_merged_as_peft_does_it(
    settings: dict[str, Any], adapted: Any, tiny: Path, tmp_path: Path
) -> None:
    adapter, want = adapted(**settings)
    split_model(str(tiny), tmp_path / "merged", Options(rank=4), adapter=adapter)
    assert error(want, protected(tmp_path / "merged")) < 1e-3
    split_model(str(adapter), tmp_path / "alone", Options(rank=4, base=str(tiny)))
    assert error(want, protected(tmp_path / "alone")) < 1e-3


@pytest.mark.parametrize(
    "targets", [["attn.c_proj", "lm_head"], ["c_attn", "wte"], ["c_attn", "mlp.c_proj", "lm_head"]]
)
def test_each_layer_s_class_says_how_its_matrix_is_stored(
    targets: list[str], adapted: Any, gpt2: Path, tmp_path: Path
) -> None:
    """PEFT saves one `fan_in_fan_out`, of the last layer that it met."""
    adapter, want = adapted(gpt2, target_modules=targets)
    split_model(str(gpt2), tmp_path / "out", Options(rank=4), adapter=adapter)
    assert error(want, protected(tmp_path / "out")) < 1e-3


@pytest.mark.parametrize("edited", [True, False])
def test_what_the_adapter_says_about_it_does_not_count(
    edited: bool, adapted: Any, tiny: Path, gpt2: Path, tmp_path: Path
) -> None:
    base, targets = (tiny, ["q_proj", "o_proj"]) if edited else (gpt2, ["attn.c_proj"])
    adapter, _ = adapted(base, target_modules=targets)
    edit(adapter, fan_in_fan_out=edited)
    want = logits(peft.PeftModel.from_pretrained(original(base), adapter))
    split_model(str(base), tmp_path / "out", Options(rank=4), adapter=adapter)
    assert error(want, protected(tmp_path / "out")) < 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [["lm_head", "embed_tokens"], None])
def test_an_adapter_may_bring_tokens(whole: list[str] | None, tied: bool, adapted: Any, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    adapter, want = adapted(base, 260, modules_to_save=whole)
    split_model(str(base), tmp_path / "merged", Options(rank=4), adapter=adapter)
    assert error(want, protected(tmp_path / "merged")) < 1e-3 and want.shape[-1] == 260
    split_model(str(adapter), tmp_path / "alone", Options(rank=4, base=str(base)))
    assert error(want, protected(tmp_path / "alone")) < 1e-3


def test_an_adapter_that_brings_tokens_and_no_head_is_refused(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    """PEFT would run it with a head of random rows."""
    adapter, _ = adapted(tiny, 260, target_modules=["embed_tokens"])
    with pytest.raises(
        UnsupportedModelError, match=r"needs lm_head\.weight of shape \(260, 60\).*merge them with PEFT"
    ):
        split_model(str(tiny), tmp_path / "out", Options(rank=4), adapter=adapter)


def edit(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_is_never_dropped(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    adapter, _ = adapted()
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / file, model / file)
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter beside the model .* --adapter"):
        split_model(str(model), tmp_path / "out", Options(rank=4))
    with pytest.raises(UnsupportedModelError, match=r"is an adapter, not a model: .* --base"):
        split_model(str(adapter), tmp_path / "out", Options(rank=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"peft_type": None}, "says no peft_type"),
        ({"lora_alpha": "much"}, "no usable lora_alpha"),
        ({"lora_alpha": "6"}, "no usable lora_alpha"),
        ({"alpha_pattern": {"q_proj": "6"}}, "no usable lora_alpha"),
        ({"alpha_pattern": ["q_proj"]}, "no usable lora_alpha"),
        ({"alpha_pattern": {"(": 6}}, "no usable lora_alpha"),
        ({"something_new": {"a": 1}}, "something_new"),
    ],
)
def test_other_adapters_are_refused(
    settings: dict[str, Any], says: str, adapted: Any, tiny: Path, tmp_path: Path
) -> None:
    adapter, _ = adapted()
    edit(adapter, **settings)
    with pytest.raises(UnsupportedModelError, match=says):
        split_model(str(tiny), tmp_path / "out", Options(rank=4), adapter=adapter)


def test_an_adapter_of_another_model_is_refused(adapted: Any, tmp_path: Path) -> None:
    adapter, _ = adapted()
    small = save_tiny(tmp_path / "small", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="which this model lacks"):
        split_model(str(small), tmp_path / "out", Options(rank=4), adapter=adapter)


def test_an_adapter_s_tokenizer_is_taken_if_it_is_whole(
    adapted: Any, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, _ = adapted()
    own = byte_tokenizer()
    own.chat_template = "{{ messages[0].content }} as tuned"
    own.save_pretrained(adapter)
    split_model(str(tiny), tmp_path / "own", Options(rank=4), adapter=adapter)
    (adapter / "tokenizer.json").unlink()
    (adapter / "chat_template.jinja").unlink()
    assert (adapter / "tokenizer_config.json").is_file() and "no vocabulary" not in caplog.text
    split_model(str(tiny), tmp_path / "base", Options(rank=4), adapter=adapter)
    assert "no vocabulary: the model's own tokenizer is taken" in caplog.text
    found = [transformers.AutoTokenizer.from_pretrained(tmp_path / d / "trusted") for d in ("own", "base")]
    assert ["as tuned" in tokenizer.chat_template for tokenizer in found] == [True, False]
