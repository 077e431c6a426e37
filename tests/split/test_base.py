"""Fine-tunes of public models: what the edge holds, and that the protected model is still the fine-tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from loading import attached
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle
from sliplm.attacks.stolen import ALL, Stolen
from sliplm.errors import UnsupportedModelError
from sliplm.split.base import divide
from sliplm.split.model import Options, split_model


def tune(directory: Path, out: Path, rank: int, dtype: torch.dtype) -> Path:
    """A fine-tune of the model in `directory`: a difference of this rank on every matrix."""
    save_tiny(out)
    state = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in state.items():
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            state[name] = weight + 0.05 * low / rank**0.5
    save_file({n: t.to(dtype).contiguous() for n, t in state.items()}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_leaves_the_public_weights_on_the_edge(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tuned = tune(tiny, tmp_path / "tuned", 3, dtype)
    split_model(str(tuned), tmp_path / "out", Options(rank=4, base=str(tiny)))
    public = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    edge = Stolen(tmp_path / "out").model(ALL)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.allclose(edge.get_parameter(name), public.get_parameter(name), atol=3e-4)
    original = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    protected = attached(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "trusted"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want, got, other = (m(ids).logits for m in (original, protected, public))
    error = float((want - got).std() / want.std())
    assert error < (1e-3 if dtype is torch.float32 else 2e-2) and error < 0.1 * float((want - other).std() / want.std())


def test_a_full_fine_tune_keeps_its_leading_difference_and_stays_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    public = torch.randn(80, 60, generator=generator)
    weight = public + 0.01 * torch.randn(80, 60, generator=generator)
    a, b, edge = divide(weight, 4, True, generator, public, 2.0**-7)
    assert a.shape == (80, 10)
    assert torch.allclose(a @ b + edge, weight, atol=1e-5)
    assert float((edge - public).norm()) > 0.001


def test_the_wrong_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", intermediate_size=160)
    with pytest.raises(UnsupportedModelError, match="is not the base of this model"):
        split_model(str(tiny), tmp_path / "out", Options(rank=4, base=str(other)))
    assert not (tmp_path / "out").exists()


def test_a_base_that_holds_two_tensors_for_one_place_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Whichever of them was compared, the edge would get the difference to the other."""
    tuned, base = tune(tiny, tmp_path / "tuned", 3, torch.float32), save_tiny(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    doubled = state | {n.removeprefix("model."): t.roll(1, 0).contiguous() for n, t in state.items()}
    save_file(doubled, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="which are both loaded as"):
        split_model(str(tuned), tmp_path / "out", Options(rank=4, base=str(base)))
    assert not (tmp_path / "out").exists()
