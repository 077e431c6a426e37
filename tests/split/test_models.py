"""Every family of models: the split's results are the original's, through Transformers' own loading and generation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from counting import Counting
from loading import attached
from tiny import byte_tokenizer, save_tiny
from torch import nn
from zoo import EXPERTS, FAMILIES, RANK, Family, bfloat16_error, halves, inputs_for, relative_error

import sliplm
from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.evaluate.report import edge_only
from sliplm.split import source
from sliplm.split.groups import find_groups
from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow


Halved = Callable[[str], tuple[Any, Any, Path]]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Halved:
    """Of a family: the original, the protected model, and where the files of both are. Made once, and only read."""

    @cache
    def made(name: str) -> tuple[Any, Any, Path]:
        where = tmp_path_factory.mktemp("family")
        return *halves(FAMILIES[name], where), where

    return made


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_results_are_the_originals(name: str, halved: Halved) -> None:
    family = FAMILIES[name]
    model, protected, _ = halved(name)
    inputs = inputs_for(model)
    link = Counting(protected.slip.default_link)
    want = model(**inputs).logits
    with protected.slip.using(link):
        got = protected(**inputs).logits
    error = relative_error(want, got)
    assert error < 1e-3
    assert error * 20 < bfloat16_error(model, inputs, want)
    if family.round_trips:
        assert len(link.groups) == family.round_trips == len(set(link.groups))
    if model.can_generate() and "BERT" not in name:
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        prompt = {"input_ids": inputs["input_ids"]}
        assert torch.equal(model.generate(**prompt, **settings), protected.generate(**prompt, **settings))


@pytest.mark.parametrize("name", ["GPT-2 (Conv1D)", "Phi (parallel blocks)", "Mixtral", "ResNet", "BERT", "T5"])
@torch.no_grad()
def test_the_edge_part_alone_lacks_what_the_trusted_side_has(name: str, halved: Halved) -> None:
    model, protected, where = halved(name)
    edge = edge_only(where / "out")
    assert type(edge) is type(model)
    names = [n for n, p in edge.named_parameters() if n in dict(model.named_parameters())]
    changed = [n for n in names if not torch.equal(edge.get_parameter(n), model.get_parameter(n))]
    kept = {n for n, _ in protected.named_parameters()}
    assert changed and not kept & {n for n in changed if n.endswith("weight") and "embed" not in n}
    assert relative_error(model(**inputs_for(model)).logits, edge(**inputs_for(model)).logits) > 0.2


@torch.no_grad()
def test_the_split_of_a_routed_model_warns_of_what_the_edge_sees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    halves(FAMILIES["Mixtral"], tmp_path)
    assert "how many tokens each expert gets" in caplog.text


def test_experts_without_tokens_are_not_asked(tmp_path: Path) -> None:
    family = Family(lambda: transformers.MixtralConfig(**EXPERTS, num_local_experts=4, num_experts_per_tok=1))
    model, protected = halves(family, tmp_path)
    link = Counting(protected.slip.default_link)
    with protected.slip.using(link):
        got = protected(torch.tensor([[7]])).logits
    # Per block: qkv, o, and one expert's two matrices; then the head.
    assert len(link.groups) == 2 * 4 + 1
    assert relative_error(model(torch.tensor([[7]])).logits, got) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "T5", "ViT", "Mixtral", "ResNet"])
@torch.no_grad()
def test_models_loaded_in_half_precision(name: str, dtype: torch.dtype, halved: Halved) -> None:
    model, _, where = halved(name)
    protected = attached(FAMILIES[name].auto.from_pretrained(where / "out" / "trusted", dtype=dtype))
    inputs = inputs_for(model)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    got = protected(**cast).logits
    assert got.dtype == dtype
    assert relative_error(model(**inputs).logits, got) < 0.1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(30, 30)
        self.head = nn.Linear(30, 30)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64)


@pytest.mark.parametrize(
    ("module", "culprit"), [(Recurrent, r"memory \(LSTM\)"), (Attending, r"layer\.self_attn \(MultiheadAttention\)")]
)
def test_what_cannot_be_protected_is_refused_by_name(module: type[nn.Module], culprit: str) -> None:
    with pytest.raises(UnsupportedModelError, match=culprit):
        sliplm.protect(module())


def test_a_model_without_large_matrices_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="no layer to protect at rank 1000"):
        split_model(str(directory), tmp_path / "out", Options(1000))


def test_small_matrices_stay_on_the_trusted_side(tmp_path: Path) -> None:
    summary = split_model(str(save_tiny(tmp_path / "model")), tmp_path / "out", Options(20))
    assert [k.split()[0] for k in summary.kept][:2] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_another_model_class_is_refused(halved: Halved) -> None:
    with pytest.raises(BundleError, match="load it as LlamaForCausalLM"):
        transformers.AutoModelForSequenceClassification.from_pretrained(halved("Llama")[2] / "out" / "trusted")


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "BERT", "GPT-2 (Conv1D)"])
def test_without_sliplm_a_bundle_does_not_load(name: str, halved: Halved) -> None:
    """Transformers skips quantization methods it does not know, and would make the weights up."""
    code = (
        f"import sys, transformers as t; t.{FAMILIES[name].auto.__name__}.from_pretrained(sys.argv[1]);"
        "assert 'sliplm' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(halved(name)[2] / "out" / "trusted")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "this is a bundle of sliplm: `import sliplm.trusted` before you load it" in done.stderr


def test_parallel_and_cross_attention_groups() -> None:
    def groups(family: Family) -> list[list[str]]:
        with torch.device("meta"):
            model = family.auto.from_config(family.make()).eval()
        with source.fake_mode():
            return [[m.name for m in group] for group in find_groups(model.to_empty(device="cpu"), rank=RANK)]

    # T5's decoder blocks all read the encoder's output: one round trip for the keys and values of all.
    assert sorted(map(len, groups(FAMILIES["T5"])))[-1] == 4
    assert groups(FAMILIES["Phi (parallel blocks)"])[:2] == [
        [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")],
        [f"model.layers.0.{n}" for n in ("self_attn.dense", "mlp.fc2")],
    ]


# --- what people do with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tiny: Path, tiny_split: Path) -> tuple[Any, Any]:
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(tiny, dtype=torch.float32), attached(auto.from_pretrained(tiny_split / "trusted"))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"cache_implementation": "static"},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generation(settings: dict[str, Any], mode: Any, pair: tuple[Any, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<end>", "left"
    batch = tokenizer(["Hello", "A longer text than that", "?"], return_tensors="pt", padding=True)
    outs = []
    for model in pair:
        torch.manual_seed(1)
        with mode():
            outs.append(model.generate(**batch, max_new_tokens=10, **settings))
    assert torch.equal(*outs)


def test_pipeline(tiny: Path, tiny_split: Path) -> None:
    original, protected = (
        transformers.pipeline("text-generation", str(where), dtype=torch.float32)
        for where in (tiny, tiny_split / "trusted")
    )
    attached(protected.model)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    prompts = ["Hello", "Hi there"]
    assert original(prompts, **settings) == protected(prompts, **settings)


@torch.no_grad()
def test_a_long_prompt(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", max_position_embeddings=2048, num_hidden_layers=1)
    split_model(str(directory), tmp_path / "out", Options(4))
    auto = transformers.AutoModelForCausalLM
    ids = torch.randint(0, 256, (1, 1500), generator=torch.Generator().manual_seed(0))
    models = [
        auto.from_pretrained(directory, dtype=torch.float32),
        attached(auto.from_pretrained(tmp_path / "out" / "trusted")),
    ]
    want, got = (m(ids).logits for m in models)
    assert relative_error(want, got) < 1e-3
