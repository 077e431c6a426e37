"""The attacks find what a plain split leaves open, find nothing in a hardened one, and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format2 import Rotation
from tiny import save_tiny
from typer.testing import CliRunner

from sliplm.attacks import arrow, blinding, gram, subspace, suite
from sliplm.attacks.null_space import smallest
from sliplm.attacks.stolen import ALL, NONE, Oracles, Stolen, guess_scales, trim
from sliplm.attacks.verdict import verdict
from sliplm.cli import app
from sliplm.errors import BundleError, SlipError
from sliplm.split import planes
from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundles(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("attacked")
    split_model(str(tiny), out / "plain", Options(rank=4, camouflage=False, blinding=False))
    split_model(str(tiny), out / "default", Options(rank=4))
    return out / "plain", out / "default"


@pytest.fixture(scope="module")
def result(tiny: Path, bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report = tmp_path_factory.mktemp("report") / "out.html"
    arguments = [
        "attack",
        *map(str, bundles),
        "--reference",
        str(tiny),
        "--budget",
        "1024",
        "--json",
        "--report",
        str(report),
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert "Verdict" in page and "Limits" in page
    return json.loads(done.stdout)


def test_detectors_find_the_plain_split_and_not_the_default_one(
    result: dict[str, Any], bundles: tuple[Path, Path]
) -> None:
    plain, default = (result["bundles"][str(d)]["subspace"] for d in bundles)
    assert plain["without secrets"]["determined"]["smallest"]["overlap"] > 0.99
    for secrets in ("without secrets", "blinding secrets given"):
        for detector in subspace.DETECTORS:
            assert default[secrets]["determined"][detector]["overlap"] < 0.5, (secrets, detector)
    assert default["without secrets"]["determined"]["smallest"]["times_chance"] < 2


def test_every_attack_has_a_curve_and_a_sentence(result: dict[str, Any], bundles: tuple[Path, Path]) -> None:
    for directory in map(str, bundles):
        for method in ("direct", "full", "lora", "null-space", "distill"):
            for oracles in ("none", "all"):
                line = result["bundles"][directory][method][oracles]
                assert line["reached"] == pytest.approx(line["ppl"][-1]) and len(line["ppl"]) == len(line["tokens"])
                assert line["low"] <= line["reached"] * (1 + 1e-9) <= line["high"] * (1 + 2e-9)
                said = any(x.startswith(f"{method}, oracles {oracles}") for x in result["verdict"][directory])
                assert said is (method != "direct")
    for objective in ("text", "answers"):
        for line in result["without"][objective].values():
            assert line["seeds"] == 3 and line["reached"] < line["ppl"][0]


def test_blinding_hides_the_shared_basis(result: dict[str, Any], bundles: tuple[Path, Path]) -> None:
    default = result["bundles"][str(bundles[1])]
    assert default["blinding"]["columns_matched"] < 0.2
    assert default["public-base"]["columns"] < 0.1 and default["public-base"]["rows"] < 0.1
    plain = result["bundles"][str(bundles[0])]
    assert plain["public-base"]["rows"] > 0.9 and plain["public-base"]["columns"] > 0.5


def test_columns_marked_by_their_statistics_are_aligned() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(400, 64, generator=generator)
    second = first[torch.randperm(400, generator=generator)] + 1e-4 * torch.randn(400, 64, generator=generator)
    share, chance = blinding.recovered(first, second, (None, None))
    assert share > 0.9 > 10 * chance
    for rounds, least, most in ((1, 0.9, 1.01), (2, 0.0, 0.2)):
        turned = [rotation(64, rounds, seed) for seed in (1, 2)]
        share, _ = blinding.recovered(turned[0].apply(first), turned[1].apply(second), (turned[0], turned[1]))
        assert least <= share < most  # known scales and no camouflage: one round hides nothing


def rotation(n: int, rounds: int, seed: int) -> Rotation:
    return Rotation.random(n, np.random.default_rng(seed), rounds)


def test_a_public_base_undoes_signed_permutations() -> None:
    base = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for rounds, least, most in ((1, 0.999, 1.01), (2, 0.0, 0.2)):
        inner, outer = rotation(40, rounds, 1), rotation(50, rounds, 2)
        stolen = outer.apply(inner.apply(base).T).T
        assert least < arrow.identified(stolen, base, outer) < most
    assert arrow.identified(base, base, None) == 1
    assert arrow.identified(torch.randn(50, 40), base, rotation(50, 1, 2)) < 0.3


def test_gram_matrices_undo_one_round_and_not_two() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)  # unequal columns
    close = base + 0.01 * base.std() * torch.randn(200, 64, generator=generator)
    for rounds, least, most in ((1, 0.95, 1.01), (2, 0.0, 0.2)):
        inner, outer = rotation(64, rounds, 1), rotation(200, rounds, 2)
        stolen = outer.apply(inner.apply(close).T).T
        assert least < gram.columns(stolen, base, inner) < most
        assert gram.spectrum(stolen, base, inner) > 0.3  # no orthogonal blinding hides it
    assert gram.columns(close, base, None) > 0.95
    cut = torch.linalg.svdvals(gram.without_leading(base, 8))
    assert cut[0] < 1.01 * torch.linalg.svdvals(base)[8]


def test_oracles_add_up_to_the_best_case(bundles: tuple[Path, Path], tiny: Path) -> None:
    import transformers

    original = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    name = "model.layers.0.mlp.down_proj.weight"
    for directory in bundles:
        stolen = Stolen(directory)
        best, guessed = stolen.model(ALL), stolen.model(NONE)
        with torch.no_grad():
            kept = best.get_parameter(name) - original.get_parameter(name)
            rank = int((torch.linalg.svdvals(kept) > 1e-2).sum())
            assert rank == (4 if directory is bundles[0] else 10)
            assert torch.equal(best.model.embed_tokens.weight, original.model.embed_tokens.weight)
            assert not torch.equal(guessed.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert [str(o) for o in (NONE, ALL, Oracles(scales=True))] == ["none", "all", "scales"]


def test_a_placebo_knows_nothing_of_the_bundle(bundles: tuple[Path, Path]) -> None:
    stolen = Stolen(bundles[0])
    name = "model.layers.0.mlp.down_proj.weight"
    placebo, real = stolen.placebo().get_parameter(name), stolen.model(NONE).get_parameter(name)
    assert abs(float(torch.corrcoef(torch.stack([placebo.flatten(), real.flatten()]))[0, 1])) < 0.05
    assert 0.9 < float(placebo.std() / real.std()) < 1.1
    assert torch.equal(stolen.model(NONE).get_parameter(name), real)  # the real integers are back


def test_guessed_scales_keep_the_planes_in_proportion() -> None:
    weight = torch.randn(20, 400, generator=torch.Generator().manual_seed(0))
    q, scales = planes.quantise(weight, 2)
    guess = guess_scales(q, 2, 1.0)
    ratio = guess / scales
    assert bool(((ratio > 0.85) & (ratio < 1.15)).all())


def test_smallest_singular_vectors_of_both_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((30, 20), (20, 30)):
        u, s, vt = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
        left, right = smallest((u * s) @ vt, 3)
        assert subspace.overlap(left, u[:, -3:]) > 0.999 and subspace.overlap(right.T, vt[-3:].T) > 0.999


def test_bad_requests_are_one_sentence(tiny: Path, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SlipError, match="no attack 'magic'"):
        suite.attack([bundles[0]], str(tiny), ["magic"])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SlipError, match="are needed"):
        suite.attack([bundles[0]], str(tiny), ["direct"], text_file=tmp_path / "short.txt")
    other = save_tiny(tmp_path / "other", vocab_size=300)
    with pytest.raises(BundleError, match="not the model"):
        suite.attack([bundles[0]], str(other), ["direct"])


def test_success_is_five_percent_and_more_than_the_seeds_differ() -> None:
    def line(reached: float, low: float, high: float, valid: float = 1.0) -> dict[str, Any]:
        return {"reached": reached, "low": low, "high": high, "valid": valid, "tokens": [0, 1]}

    def said(attack: dict[str, Any]) -> str:
        without = {"text": {"stock": line(90, 90, 90, 2.0), "placebo": line(100, 97, 103)}}
        return verdict({"without": without, "bundles": {"b": {"full": {"none": attack}}}})["b"][0]

    assert "worth something" in said(line(90, 89, 91)) and "10% better" in said(line(90, 89, 91))
    assert "seeds give" in said(line(94, 90, 98)) and "No success" in said(line(96, 96, 96))
    assert "(100, seeds 97 to 103)" in said(line(96, 96, 96))  # the better on validation, not on the held-out text


def test_finished_runs_are_not_run_again(tiny: Path, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    first, again = (
        suite.attack([bundles[0]], str(tiny), ["lora"], budget=512, finished=tmp_path / "runs.jsonl") for _ in range(2)
    )
    assert first["bundles"] == again["bundles"] and first["without"] == again["without"]
    count = len((tmp_path / "runs.jsonl").read_text().splitlines())
    assert count == 2 * (2 + 2) + 2 * 2  # two starts: two rates, two more seeds; LoRA: two rates, two oracles


def test_a_trimmed_model_answers_as_the_whole_one(tiny: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    kept = torch.arange(10, 60)
    with torch.no_grad():
        want = model(torch.arange(20, 40)[None]).logits[..., kept]
        got = trim(model, kept)(torch.arange(10, 30)[None]).logits
    assert torch.allclose(want, got, atol=1e-5)


def test_own_samples_are_text_of_the_model(tiny: Path, bundles: tuple[Path, Path]) -> None:
    done = suite.attack([bundles[0]], str(tiny), ["direct"], budget=512, own_samples=True)
    assert done["text"] == "samples" and done["bundles"][str(bundles[0])]["direct"]["all"]["reached"] > 1
