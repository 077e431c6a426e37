"""What a thief with the public base makes of a fine-tune's bundle: only of what it has, and of a LoRA's nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.finetune import world
from sliplm.attacks import finetune
from sliplm.attacks.stolen import ALL, Stolen
from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune of the tiny model, and its splits with the base and without."""
    directory = tmp_path_factory.mktemp("tuned")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data += 0.02 * weight.std() * torch.randn(weight.shape)
    model.save_pretrained(directory / "model")
    for name, base in (("based", str(tiny)), ("default", None)):
        split_model(str(directory / "model"), directory / name, Options(rank=4, base=base))
    return directory


def test_a_share_is_of_the_gain_in_log_perplexity() -> None:
    assert finetune.share(100, 100, 10) == 0 and finetune.share(100, 10, 10) == 1
    assert math.isclose(finetune.share(100, math.sqrt(1000), 10), 0.5)
    assert math.isclose(finetune.share(100, 1000, 10), -1)  # worse than the base


@pytest.mark.parametrize("name", ["based", "default"])
def test_a_thief_without_oracles_reads_no_secret(
    name: str, tuned: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guess is the same with the trusted side's numbers poisoned, when what it draws itself is the same."""
    public = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    stolen, file = Stolen(tuned / name), tuned / name / "trusted" / "model.safetensors"
    raw, guesses = file.read_bytes(), []
    for poisoned in (False, True):
        if poisoned:
            save_file(
                {key: torch.full_like(value, 7) for key, value in load_file(file).items()}, file, {"format": "pt"}
            )
        draws = np.random.default_rng(0)
        monkeypatch.setattr("os.urandom", draws.bytes)
        monkeypatch.setattr("secrets.token_bytes", draws.bytes)
        model = finetune.assemble(stolen, public, finetune.direct(stolen, public, based=name == "based"))
        guesses.append(model.get_parameter(LAYER).detach())
    file.write_bytes(raw)
    assert torch.equal(*guesses)


def test_with_scales_and_blinding_given_the_edge_part_is_known(tuned: Path, tiny: Path) -> None:
    public = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    owner = transformers.AutoModelForCausalLM.from_pretrained(tuned / "model")
    want = owner.get_parameter(LAYER)
    away = float((public.get_parameter(LAYER) - want).norm())
    for name in ("based", "default"):
        stolen = Stolen(tuned / name)
        model = finetune.assemble(stolen, public, finetune.known_edge(stolen, public, based=name == "based"))
        assert float((model.get_parameter(LAYER) - want).norm()) < away


def test_a_lora_s_edge_part_is_the_public_model_s(tiny: Path, tmp_path: Path) -> None:
    public = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data += 0.05 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1])
    model.save_pretrained(tmp_path / "model")
    split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=4, base=str(tiny)))
    edge = Stolen(tmp_path / "out").model(ALL)
    for name, weight in edge.named_parameters():
        if name.endswith("proj.weight"):
            known = public.get_parameter(name)
            assert float((weight - known).norm() / known.norm()) < 1e-3


def test_the_invented_language_is_fixed_and_its_texts_are_disjoint() -> None:
    a, b = world.Language(), world.Language()
    text = "Objects are Python's abstraction for data. Objects have an identity."
    assert a.translate(text) == b.translate(text) and "identity" not in a.translate(text)
    first, *_, second = a.translate("Objects and objects").split()
    assert first.lower() == second and first[0].isupper()
    assert a.translate("with them, if any") == "with them, if any"
    found = world.paragraphs()
    assert len(found) == len(set(found)) > 1000


def test_small_singular_values_are_values_and_not_rounding() -> None:
    """Squared in float32, those below a thousandth of the largest would be noise, and ratios of them anything."""
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.double))[0] for n in (60, 40))
    values = torch.logspace(0, -4, 40, dtype=torch.double)
    found, vectors = finetune._spectrum(((left * values) @ right.T).float())
    assert torch.allclose(found.double(), values, rtol=0.02)
    assert float((vectors.double() * right).sum(0).abs().min()) > 0.99
