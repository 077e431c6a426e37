"""The attack that undid the blinding of bundle format 2 does so here, and does nothing to today's; and why members of a
group have one blinding of outputs between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format2 import Rotation, trained_like
from safetensors import safe_open
from transformers import AutoConfig

from sliplm.attacks import unblinding
from sliplm.split.blinding import Blinding, blind, hadamard, stored
from sliplm.split.planes import dequantise, quantise

pytestmark = pytest.mark.slow

N = 256
EPS = 0.005  # relative size of the fine-tune


@pytest.fixture(scope="module")
def tuned() -> tuple[torch.Tensor, torch.Tensor]:
    """A public matrix like trained ones, and a full-rank fine-tune of it."""
    rng = np.random.default_rng(0)
    public = trained_like(N, rng)
    difference = torch.from_numpy(rng.standard_normal((N, N), np.float32))
    return public, public + difference * (EPS * public.norm() / difference.norm())


def scored(tuned: tuple[torch.Tensor, torch.Tensor], kind: Any, normal: bool = False) -> unblinding.Score:
    """What the attack makes of the blinded fine-tune, true row scales given."""
    public, weight = tuned
    rng = np.random.default_rng(1)
    inner, outer = kind.random(N, rng), kind.random(N, rng)
    stolen = dequantise(*quantise(blind(weight.double(), inner, outer).float(), 2))
    return unblinding.attack(stolen, public, scales=True, normal=normal).score(inner, outer)


def test_the_blinding_of_format_2_falls(tuned: tuple[torch.Tensor, torch.Tensor]) -> None:
    score = scored(tuned, Rotation)
    assert score.alignment > 0.5 and score.signs > 0.5 and score.rotation > 0.9


@pytest.mark.parametrize("normal", [False, True])
def test_todays_blinding_does_not(tuned: tuple[torch.Tensor, torch.Tensor], normal: bool) -> None:
    score = scored(tuned, Blinding, normal)
    assert score.rotation < 0.1 and score.signs < 0.3  # chance is 0.06 for so few signs


def test_the_diagonal_blurs_the_directions(tuned: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Without(Blinding):
        @classmethod
        def random(cls, n: int, rng: np.random.Generator | None = None) -> Blinding:
            whole = Blinding.random(n, rng)
            return replace(whole, diagonal=np.ones_like(whole.diagonal))

    assert scored(tuned, Without).alignment > 0.5 > 3 * scored(tuned, Blinding).alignment


def moments(rotation: Any, n: int, count: int) -> tuple[float, float]:
    """Kurtosis and sixth moment of the entries of `count` rotations, as deviations from Haar's, in standard errors."""
    fourth = sixth = 0.0
    for seed in range(count):
        whole = rotation(n, np.random.default_rng(seed)).apply(torch.eye(n, dtype=torch.float64))
        squares = (hadamard(whole) * n**0.5).square()  # the last transform is public
        fourth += float(squares.square().mean()) / count
        sixth += float((squares**3).mean()) / count
    entries = count * n * n
    z4 = (fourth - 3 * n / (n + 2)) / (96 / entries) ** 0.5
    return z4, (sixth - 15 * n * n / ((n + 2) * (n + 4))) / (10170 / entries) ** 0.5


def test_entries_are_those_of_any_rotation() -> None:
    def today(n: int, rng: np.random.Generator) -> Blinding:
        whole = Blinding.random(n, rng)
        return replace(whole, diagonal=np.ones_like(whole.diagonal))

    assert max(map(abs, moments(today, 576, 6))) < 5
    assert max(map(abs, moments(Rotation.random, 576, 6))) > 100


def test_a_group_has_one_blinding_of_inputs_and_one_of_outputs(tiny_split: Path) -> None:
    """Nothing but what is drawn for the group's leader, and no two groups share any of it."""
    plan = AutoConfig.from_pretrained(tiny_split / "trusted").quantization_config["plan"]
    groups = [of["members"] for of in plan]
    parts = [f"{side}_{kind}" for side in ("in", "out") for kind in Blinding.layout(2)]
    seen: set[bytes] = set()
    with safe_open(tiny_split / "trusted" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert any(len(group) > 1 for group in groups)
        for leader, *others in groups:
            assert {f"{leader}.{part}" for part in parts} <= names
            assert not {f"{other}.{part}" for other in others for part in parts} & names
            inner, outer = stored(file.get_tensor, leader)
            rows = sum(len(file.get_tensor(f"{member}.factor_a")) for member in (leader, *others))
            assert len(outer) == rows and len(inner) == file.get_tensor(f"{leader}.factor_b").shape[1]
            seen |= {b.angle.tobytes() for b in (inner, outer)} | {b.perm.tobytes() for b in (inner, outer)}
    assert len(seen) == 4 * len(groups)


def test_members_with_outputs_blinded_apart_would_show_the_signs_of_shared_inputs() -> None:
    """Even under rotations drawn from all alike (Haar): line up the singular vectors of one member with the base's, up
    to signs, and read the signs off what the other makes of them. Where all outputs are blinded as one there is no
    other."""
    generator = torch.Generator().manual_seed(0)
    n = 64

    def haar(size: int) -> torch.Tensor:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return q * torch.sign(torch.diagonal(r))

    gate, up = (torch.randn(100, n, generator=generator, dtype=torch.float64) for _ in range(2))
    shared = haar(n)
    stolen = [haar(100) @ w @ shared.T for w in (gate, up)]
    v, known = (torch.linalg.svd(w)[2].T for w in (stolen[0], gate))  # columns: directions in either basis
    truth = torch.sign(((shared @ known) * v).sum(0))
    here, there = (m @ (x.T @ x) @ m.T for m, x in ((v.T, stolen[1]), (known.T, up)))
    relative = torch.sign(here * there)  # entry (i, j) is sign_i sign_j, whatever the outputs' basis
    found = torch.sign(relative[:, 0])
    assert abs(float((found * truth).mean())) > 0.9
