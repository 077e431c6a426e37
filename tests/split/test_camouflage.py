"""Camouflage: exact sums, an inconspicuous spectrum, and protected directions that look like any others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.attacks import subspace
from sliplm.split import camouflage, factors
from sliplm.split.advice import weaknesses
from sliplm.split.model import Options


def heavy(rows: int, columns: int, rank: int) -> torch.Tensor:
    """A matrix as training leaves it: a bulk, and leading components that sit on a few coordinates."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    for i in range(rank):
        u, v = (torch.randn(n, generator=generator) * 0.1 for n in (rows, columns))
        u[i % 3], v[7 + i % 3] = 3 + i, 2 + i
        weight += 20 * torch.outer(u / u.norm(), v / v.norm())
    return weight


def parts(weight: torch.Tensor, rank: int, hidden: bool) -> tuple[factors.Factors, torch.Tensor, torch.Tensor]:
    found = factors.leading(weight, rank, torch.Generator().manual_seed(0))
    return found, *camouflage.low_rank(weight, found, hidden)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_shapes_are_the_announced_ones_for_every_size(rows: int, columns: int, rank: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank))
    for hidden in (False, True):
        _, a, b = parts(weight, rank, hidden)
        size = camouflage.trusted_rank(rank, rows, columns, hidden)
        assert a.shape == (rows, size) and b.shape == (size, columns)
        assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())


@pytest.mark.parametrize("shape", [(200, 160), (160, 200), (120, 120)])
def test_no_detector_beats_chance_and_singular_values_stay(shape: tuple[int, int]) -> None:
    rank = 6
    weight = heavy(*shape, rank)
    found, a, b = parts(weight, rank, True)
    edge = weight - a @ b
    spectrum = torch.linalg.svdvals(edge.double())
    assert spectrum.max() <= 1.001 * found.rest.max() and spectrum.min() >= 0.5 * found.rest.min()
    for target, secret in ((edge, found.vt.T), (edge.T, found.u)):
        chance = rank / len(secret)
        for detector, guess in subspace.find(target, rank).items():
            assert subspace.overlap(guess, secret) < 4 * chance, detector  # 5 times its standard deviation and more


def test_the_detectors_work_where_there_is_something_to_find() -> None:
    rank = 6
    weight = heavy(200, 160, rank)
    found, a, b = parts(weight, rank, False)
    assert subspace.overlap(subspace.find(weight - a @ b, rank)["smallest"], found.vt.T) > 0.999
    # Filling the hole without swapping: the shape of the planted directions gives them away.
    core = (
        camouflage.random_orthogonal(rank) * camouflage.between(found.rest, rank) @ camouflage.random_orthogonal(rank)
    )
    filled = weight - a @ b + found.u @ core.float() @ found.vt
    assert subspace.overlap(subspace.find(filled, rank)["localised"], found.vt.T) > 0.2


def test_seven_in_ten_of_the_swapped_directions_share_a_place() -> None:
    assert camouflage.trusted_rank(16, 576, 1536, True) == 37 and camouflage.trusted_rank(16, 576, 1536, False) == 16
    for shape in ((90, 120), (120, 90)):
        weight = heavy(*shape, 6)
        _, a, b = parts(weight, 6, True)
        assert int((torch.linalg.svdvals(a @ b) > 1e-3).sum()) == 14


def test_a_sketch_is_camouflaged_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "EXACT_BELOW", 0)
    for shape in ((200, 160), (160, 200)):
        weight = heavy(*shape, 6)
        _, a, b = parts(weight, 6, True)
        left = torch.linalg.svdvals((weight - a @ b).double())
        rest = torch.linalg.svdvals(weight.double())[6:]
        assert left.max() < 1.02 * rest.max() and left.min() > 0.5 * rest.min()


def test_planted_values_are_no_twins() -> None:
    values = torch.linspace(1, 2, 200).square()
    planted = camouflage.between(values, 16)
    assert len(planted.unique()) == 16
    nearest = (planted[:, None] - values.double()[None]).abs().min(1).values
    assert bool((nearest > 0.2 * (values[1:] - values[:-1]).min()).all())
    assert camouflage.between(torch.ones(1), 3).tolist() == [1, 1, 1]


def test_weak_choices_are_named() -> None:
    assert weaknesses(Options()) == []
    found = weaknesses(Options(rank=2, camouflage=False, blinding=False))
    assert len(found) == 3 and "rank 2" in found[0] and "camouflage" in found[1] and "blinding" in found[2]
