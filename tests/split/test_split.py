"""The split: exact sums, honest spectra, groups, streaming, and nothing left behind on failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from loading import attached
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from sliplm.errors import BundleError, SlipError, UnsupportedModelError
from sliplm.evaluate.report import edge_only
from sliplm.split import camouflage, factors, matrices, planes, source
from sliplm.split.groups import find_groups
from sliplm.split.matrices import row_norm
from sliplm.split.model import Options, split_model


def decaying(rows: int, columns: int) -> torch.Tensor:
    """A matrix with a known, trained-looking spectrum: a few large values over a bulk."""
    generator = torch.Generator().manual_seed(rows * columns)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator, dtype=torch.float64))
    s = 1 + 20 * torch.exp(-torch.arange(min(rows, columns), dtype=torch.float64) / 5)
    return ((u * s) @ v.T).float()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (200, 7), (1500, 1200), (1200, 1500)])
def test_leading_factors_are_the_top_singular_triplets(shape: tuple[int, int]) -> None:
    weight = decaying(*shape)
    got = factors.leading(weight, 6, torch.Generator().manual_seed(0))
    want = torch.linalg.svdvals(weight.double())
    assert torch.allclose(got.s.double(), want[:6], rtol=2e-4)
    assert torch.allclose(got.u.T @ got.u, torch.eye(6), atol=2e-4)
    assert torch.allclose(got.vt @ got.vt.T, torch.eye(6), atol=2e-4)
    assert torch.allclose(got.u.T @ weight @ got.vt.T, torch.diag(got.s), atol=2e-2)
    assert want[-1] * 0.8 <= got.rest.min() and got.rest.max() <= want[6] * 1.05


def test_residual_spectrum_of_a_large_matrix_has_the_right_quantiles() -> None:
    weight = torch.randn(1400, 1100, generator=torch.Generator().manual_seed(1))
    rest = factors.leading(weight, 8, torch.Generator().manual_seed(0)).rest.double()
    want = torch.linalg.svdvals(weight.double())[8:]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(rest.quantile(share) - want.quantile(share)) < 0.05 * want.max()


def test_plain_split_leaves_a_null_space_and_camouflage_fills_it() -> None:
    weight = decaying(96, 64)
    f = factors.leading(weight, 8, torch.Generator().manual_seed(0))
    spectra = {}
    for hidden in (False, True):
        a, b = camouflage.low_rank(weight, f, hidden)
        spectra[hidden] = torch.linalg.svdvals((weight - a @ b).double())
    assert spectra[False][-8:].max() < 1e-3
    assert spectra[True].min() > 0.5 * f.rest.min()
    assert spectra[True].max() < 1.001 * f.rest.max()


def test_camouflage_is_secret_randomness() -> None:
    weight = decaying(40, 30)
    f = factors.leading(weight, 4, torch.Generator().manual_seed(0))
    assert not torch.allclose(camouflage.low_rank(weight, f, True)[0], camouflage.low_rank(weight, f, True)[0])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2), st.integers(0, 2**31))
def test_planes_reconstruct_within_their_last_step(rows: int, columns: int, count: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10
    weight[0] = 0
    q, scales = planes.quantise(weight, count)
    assert q.shape == (count * rows, columns) and q.abs().max() <= 127
    error = (planes.dequantise(q, scales) - weight).abs()
    assert bool((error <= scales[-1][:, None] * 0.5001 + weight.abs() * 1e-6).all())


def test_row_norm_is_never_below_the_true_one() -> None:
    q = torch.randint(-127, 128, (5000, 37), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    true = max(sum(int(v) ** 2 for v in row) for row in q[:50].tolist()) ** 0.5
    assert float(row_norm(q[:50])) >= true
    assert float(row_norm(torch.zeros(2, 2, dtype=torch.int8))) >= 1


def groups_of(config: transformers.PretrainedConfig) -> list[list[str]]:
    with source.fake_mode():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        return [[m.name.split(".", 2)[-1] for m in group] for group in find_groups(model)]


def test_groups_are_the_maps_that_read_the_same_tensor() -> None:
    llama = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert groups_of(llama) == [
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
        ["lm_head"],
    ]
    # A parallel block reads one norm for attention and MLP, and adds up what they say: two round trips, not four.
    phi = transformers.PhiConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert [len(g) for g in groups_of(phi)] == [4, 2, 1]


def test_a_module_with_other_weights_is_refused_by_name() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = torch.nn.Linear(4, 4)
            self.strange = torch.nn.Bilinear(4, 4, 4)

    with pytest.raises(UnsupportedModelError, match=r"strange \(Bilinear\)"):
        find_groups(Odd(), {})


def test_split_parts_add_up_to_the_original(tiny: Path, tiny_split: Path) -> None:
    original = load_file(tiny / "model.safetensors")
    edge = dict(edge_only(tiny_split).named_parameters())
    with safe_open(tiny_split / "trusted" / "model.safetensors", "pt") as kept:
        for name, weight in original.items():
            if name.endswith("_proj.weight") or name.startswith("lm_head"):
                layer = name.removesuffix(".weight")
                low = kept.get_tensor(f"{layer}.factor_a").float() @ kept.get_tensor(f"{layer}.factor_b").float()
                assert torch.allclose(edge[name] + low, weight, atol=3e-4 * float(weight.abs().max())), name
                assert not torch.allclose(edge[name], weight, atol=0.05)
            else:
                assert torch.equal(kept.get_tensor(name), weight), name


def test_edge_bundle_holds_integers_and_shapes_and_nothing_else(tiny: Path, tiny_split: Path) -> None:
    edge = tiny_split / "edge"
    assert sorted(p.name for p in edge.iterdir()) == ["manifest.json", "q.safetensors"]
    assert json.loads((edge / "manifest.json").read_text()).keys() == {"format", "shapes", "q_sha256"}
    header_size = int.from_bytes((edge / "q.safetensors").read_bytes()[:8], "little")
    raw = (edge / "q.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + header_size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(name == str(i) and entry["dtype"] == "I8" for i, (name, entry) in enumerate(header.items()))
    assert len(raw) == 8 + header_size + sum(a * b for a, b in (e["shape"] for e in header.values()))
    # No trusted tensor's bytes, whole or in 16-byte pieces, and no name of the model, occur in the edge's files.
    everything = raw + (edge / "manifest.json").read_bytes()
    with safe_open(tiny_split / "trusted" / "model.safetensors", "pt") as kept:
        for name in kept.keys():  # noqa: SIM118
            values = kept.get_tensor(name)
            if values.numel() >= 4 and bool(values.any()) and values.float().std() > 0:
                data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                assert all(data[i : i + 16] not in everything for i in range(0, len(data) - 15, 16)), name
            assert name.encode() not in everything
    for word in (b"proj", b"embed", b"norm", b"llama", b"Llama", b"token", b"scale", b"layer"):
        assert word not in raw[: 8 + header_size] + (edge / "manifest.json").read_bytes()


def test_two_splits_of_one_model_differ(tiny: Path, tiny_split: Path, tmp_path: Path) -> None:
    other = split_model(str(tiny), tmp_path / "other", Options(rank=4))
    assert other.digest != json.loads((tiny_split / "trusted" / "manifest.json").read_text())["edge_digest"]


def test_sharded_half_precision_and_tied_checkpoints(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", tie_word_embeddings=True, attention_bias=False)
    state = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in state
    names = sorted(state)
    (directory / "model.safetensors").unlink()
    where = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({n: state[n].to(torch.bfloat16) for n in part}, directory / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    split_model(str(directory), tmp_path / "out", Options(rank=4))
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    protected = attached(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "trusted"))
    protected.tie_weights()  # as lm-eval does; it must not bring the plain head back
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want, got = reference(ids).logits, protected(ids).logits
    assert float((want - got).std() / want.std()) < 1e-3
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"model-1\.safetensors is missing"):
        split_model(str(directory), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def corrupt(directory: Path, how: str) -> None:
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    if how == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "header":
        file.write_bytes(raw[:8] + b"x" * 100 + raw[108:])
    elif how == "not finite":
        state = load_file(file)
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(state, file, {"format": "pt"})
    elif how == "missing tensor":
        state = load_file(file)
        del state["model.layers.0.mlp.up_proj.weight"]
        save_file(state, file, {"format": "pt"})
    elif how == "wrong shape":
        state = load_file(file)
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        save_file(state, file, {"format": "pt"})
    elif how == "no weights":
        file.unlink()
    elif how == "not a model":
        (directory / "config.json").write_text("{}")
    elif how == "broken config":
        (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "header",
        "not finite",
        "missing tensor",
        "wrong shape",
        "no weights",
        "not a model",
        "broken config",
    ],
)
def test_bad_models_give_one_sentence_and_leave_nothing(how: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    corrupt(directory, how)
    with pytest.raises(SlipError) as caught:
        split_model(str(directory), tmp_path / "out")
    assert "\n" not in str(caught.value) and str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "nonsense", "a/b/c"])
def test_names_that_are_no_model(model: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not a model"):
        split_model(model, tmp_path / "out")


def test_an_existing_output_is_never_touched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(BundleError, match="already exists"):
        split_model(str(tiny), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """A file-size limit makes every write beyond 64 KB fail, as a full disk does."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        "from sliplm.cli import main; sys.argv = ['slip', 'split', sys.argv[1], '-o', sys.argv[2]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny), str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_factor_that_storing_would_change_is_no_bundle() -> None:
    """Which factors are rounded is decided in one place, and relied on in another."""
    whole = torch.tensor([1.5, -0.25])
    assert torch.equal(matrices._exactly(whole, torch.bfloat16).float(), whole)
    with pytest.raises(RuntimeError, match="would be changed"):
        matrices._exactly(torch.tensor([0.1]), torch.bfloat16)
