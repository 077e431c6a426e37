"""A second split of the same weights: with the first one's camouflage, or with a warning."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from sliplm.attacks.stolen import ALL, Stolen
from sliplm.bundle import open_trusted, sha256_file
from sliplm.errors import BundleError
from sliplm.split.again import siblings
from sliplm.split.inspect import inspect
from sliplm.split.model import Options, split_model
from sliplm.split.origin import said_base

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.mlp.down_proj"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "trusted" / "model.safetensors")


@pytest.fixture(scope="module")
def again(tiny: Path, tiny_split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("again") / "second"
    split_model(str(tiny), out, Options(rank=4, again=tiny_split / "trusted"))
    return out


def test_factors_are_the_first_ones_and_the_blinding_is_new(tiny_split: Path, again: Path) -> None:
    first, second = tensors(tiny_split), tensors(again)
    assert first.keys() == second.keys()
    for name in first:
        kind = name.rpartition(".")[2]
        if kind in ("factor_a", "factor_b"):
            assert torch.equal(first[name], second[name])
        elif kind.startswith(("in_", "out_")):
            assert not torch.equal(first[name], second[name])


def test_what_two_edge_bundles_hold_differs_by_rounding_only(tiny: Path, tiny_split: Path, again: Path) -> None:
    """In a common basis: with another camouflage their difference would have the rank of both trusted parts."""
    first, second = (Stolen(d).model(ALL).get_parameter(f"{LAYER}.weight").detach() for d in (tiny_split, again))
    assert float((first - second).norm() / first.norm()) < 1e-3
    torch.manual_seed(0)
    other = again.parent / "other"
    split_model(str(tiny), other, Options(rank=4))
    third = Stolen(other).model(ALL).get_parameter(f"{LAYER}.weight").detach()
    assert float((first - third).norm() / first.norm()) > 0.05


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Path:
    """The next version of the model: one matrix differs a little."""
    directory = Path(shutil.copytree(tiny, tmp_path / "changed"))
    state = load_file(tiny / "model.safetensors")
    state[f"{LAYER}.weight"] += 0.002 * torch.randn(state[f"{LAYER}.weight"].shape)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("planes", [1, 2])
def test_other_weights_are_refused(changed: Path, tiny: Path, tmp_path: Path, planes: int) -> None:
    first = tmp_path / "first"
    split_model(str(tiny), first, Options(rank=4, planes=planes))
    with pytest.raises(BundleError, match=f"other weights .*{LAYER} differs"):
        split_model(str(changed), tmp_path / "out", Options(rank=4, again=first / "trusted"))
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 2


def age(out: Path, format: int) -> None:
    """Make the trusted bundle in `out` one of an earlier format: with Q, one rank for all, and no secrets of the check;
    before format 3 without fingerprints, too."""
    trusted, manifest = out / "trusted", json.loads((out / "trusted" / "manifest.json").read_text())
    shutil.copyfile(out / "edge" / "q.safetensors", trusted / "q.safetensors")
    config = json.loads((trusted / "config.json").read_text())
    settings = config["quantization_config"]
    plan = settings.pop("plan")
    settings |= {"rank": plan[0]["rank"], "planes": plan[0]["planes"], "groups": [of["members"] for of in plan]}
    settings["sums"] = [number for number, of in enumerate(plan) if of["kind"] == "sum"]
    (trusted / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors(out).items() if ".check_" not in name}
    save_file(kept, trusted / "model.safetensors", {"format": "pt"})
    if format < 3:
        (trusted / "weights.json").unlink()
    names = [path for path in trusted.iterdir() if path.is_file() and path.name != "manifest.json"]
    files = {path.name: sha256_file(path) for path in names}
    (trusted / "manifest.json").write_text(json.dumps(manifest | {"format": format, "files": files}))


@pytest.mark.parametrize("format", [2, 3])
def test_a_bundle_of_an_earlier_format_is_refused_and_lends_its_camouflage(
    format: int, tiny: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    split_model(str(tiny), first, Options(rank=4, blinding=format > 2))
    age(first, format)
    for what in (lambda: open_trusted(first / "trusted"), lambda: inspect(first / "trusted")):
        with pytest.raises(BundleError, match=rf"format version {format}; .* again with the same camouflage"):
            what()
    split_model(str(tiny), tmp_path / "second", Options(rank=4, again=first / "trusted"))
    ours, theirs = tensors(first), tensors(tmp_path / "second")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if ".factor_" in n)
    (first / "trusted" / "q.safetensors").unlink()
    with pytest.raises(BundleError, match="cannot read"):
        split_model(str(tiny), tmp_path / "third", Options(rank=4, again=first / "trusted"))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("old", [True, False])
def test_a_damaged_first_split_is_refused(tiny: Path, tmp_path: Path, old: bool) -> None:
    """With factors that are all zero, the edge bundle would be the whole model."""
    first = tmp_path / "first"
    split_model(str(tiny), first, Options(rank=4, blinding=not old))
    if old:
        age(first, 2)
    zeros = {n: 0 * t if "factor" in n else t for n, t in tensors(first).items()}
    save_file(zeros, first / "trusted" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match="is damaged: its SHA-256"):
        split_model(str(tiny), tmp_path / "out", Options(rank=4, again=first / "trusted"))
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_fingerprints_is_told_by_the_length_of_its_edge_part(
    changed: Path, tiny: Path, tmp_path: Path
) -> None:
    """As before format 3, whose blinding was orthogonal; without any blinding that holds, too."""
    first = tmp_path / "first"
    split_model(str(tiny), first, Options(rank=4, blinding=False))
    age(first, 2)
    split_model(str(tiny), tmp_path / "same", Options(rank=4, again=first / "trusted"))
    with pytest.raises(BundleError, match="other weights"):
        split_model(str(changed), tmp_path / "out", Options(rank=4, again=first / "trusted"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 5}, "--rank 4 and --camouflage"),
        ({"rank": 4, "camouflage": False}, "cannot serve another choice"),
    ],
)
def test_another_rank_or_camouflage_is_refused(
    tiny: Path, tiny_split: Path, tmp_path: Path, options: dict, says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        split_model(str(tiny), tmp_path / "out", Options(again=tiny_split / "trusted", **options))


def test_a_split_with_a_base_and_one_without_are_not_pooled(
    tiny: Path, changed: Path, tiny_split: Path, tmp_path: Path
) -> None:
    """The second would have on its edge what the first dropped because it depends on the difference."""
    split_model(str(changed), tmp_path / "based", Options(rank=4, base=str(tiny)))
    with pytest.raises(BundleError, match="was split with --base"):
        split_model(str(changed), tmp_path / "out", Options(rank=4, again=tmp_path / "based" / "trusted"))
    with pytest.raises(BundleError, match="was split without --base"):
        split_model(str(tiny), tmp_path / "out", Options(rank=4, base=str(changed), again=tiny_split / "trusted"))
    assert not (tmp_path / "out").exists()


def test_another_model_or_no_bundle_is_refused(tiny: Path, tiny_split: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(BundleError, match="other layers"):
        split_model(str(other), tmp_path / "out", Options(rank=4, again=tiny_split / "trusted"))
    for nothing in (tiny, tiny_split / "edge", tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"is not a (bundle|manifest) for the trusted side"):
            split_model(str(tiny), tmp_path / "out", Options(rank=4, again=nothing))


def test_a_second_split_beside_the_first_is_noticed(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split_model(str(tiny), tmp_path / "first", Options(rank=4))
    with caplog.at_level(logging.WARNING):
        split_model(str(tiny), tmp_path / "again", Options(rank=4, again=tmp_path / "first" / "trusted"))
        assert caplog.text == ""
        split_model(str(tiny), tmp_path / "second", Options(rank=4))
    assert f"split of the same weights. {ADVICE}" in caplog.text.replace(str(tmp_path), "")
    weights = json.loads((tmp_path / "first" / "trusted" / "weights.json").read_text())
    assert siblings(tmp_path / "third", ["0" * 64]) == [] and len(siblings(tmp_path / "third", weights)) == 3


ADVICE = (
    "Whoever gets both edge bundles may find what they hide by comparing them: remove this one, and split with --again "
    "/again/trusted."
)


@pytest.mark.parametrize("layer", [LAYER, "model.layers.0.self_attn.q_proj"])
def test_a_split_of_some_of_the_same_weights_is_no_split_of_the_same(
    layer: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two fine-tunes of one model share what neither changed; --again would refuse them, so nobody is sent there."""
    tuned = Path(shutil.copytree(tiny, tmp_path / "tuned"))
    state = load_file(tiny / "model.safetensors")
    state[f"{layer}.weight"] += 0.002
    save_file(state, tuned / "model.safetensors", {"format": "pt"})
    split_model(str(tiny), tmp_path / "first", Options(rank=4))
    with caplog.at_level(logging.WARNING):
        split_model(str(tuned), tmp_path / "next", Options(rank=4))
    assert "another model with some of the same weights: 8 of 9 groups" in caplog.text
    assert "--again" not in caplog.text and "same weights." not in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "base"),
    [
        ("README.md", "---\nbase_model: acme/public-7b\n---\n# A tune", "acme/public-7b"),
        ("README.md", "---\nbase_model:\n- acme/one\n- acme/two\n---\n", "acme/one"),
        ("README.md", "---\nbase_model: [\n---\n", None),
        ("README.md", "no front matter", None),
        ("adapter_config.json", '{"base_model_name_or_path": "acme/base"}', "acme/base"),
        ("adapter_config.json", '{"base_model_name_or_path": 3}', None),
        ("adapter_config.json", "[1", None),
        ("config.json", '{"_name_or_path": "acme/from-here"}', "acme/from-here"),
        ("config.json", '{"_name_or_path": "model/"}', None),
    ],
)
def test_what_a_checkpoint_says_of_its_origin(tmp_path: Path, name: str, text: str, base: str | None) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / name).write_text(text)
    assert said_base(directory) == base


def test_the_split_says_what_an_origin_means(
    changed: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = changed
    (directory / "README.md").write_text("---\nbase_model: acme/public\n---\n")
    with caplog.at_level(logging.WARNING):
        split_model(str(directory), tmp_path / "out", Options(rank=4))
    assert "--base acme/public" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        split_model(str(directory), tmp_path / "based", Options(rank=4, base=str(tiny)))
    assert "acme/public" not in caplog.text
