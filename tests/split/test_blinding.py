"""The secret change of basis: orthogonal, the transform the native code applies, and silent about itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sliplm import _core
from sliplm.split.blinding import ROUNDS, SPREAD, Blinding, blind, block_sizes, hadamard, unblind
from sliplm.split.planes import dequantise, quantise

SIZES = [1, 2, 3, 4, 7, 64, 65, 511, 512, 513, 576, 577, 960, 1536, 2048]


@given(st.integers(1, 70_000))
def test_blocks_are_powers_of_two_that_sum_to_n(n):
    sizes = block_sizes(n)
    assert sum(sizes) == n and sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 and size <= 512 for size in sizes)
    assert len(set(sizes) - {512}) == len([size for size in sizes if size < 512])  # greedy: none but 512 twice


def test_blocks_of_familiar_sizes():
    assert block_sizes(576) == [512, 64] and block_sizes(1536) == [512] * 3 and block_sizes(577) == [512, 64, 1]


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_by_its_definition(n):
    """Entry (i, j) of a block is (-1)^popcount(i & j) / sqrt(size)."""
    want = np.zeros((n, n))
    start = 0
    for size in block_sizes(n):
        i = np.arange(size)
        parity = np.array([bin(v).count("1") % 2 for v in range(size)])[i[:, None] & i]
        want[start : start + size, start : start + size] = (1 - 2 * parity) / np.sqrt(size)
        start += size
    assert np.allclose(hadamard(np.eye(n)), want, atol=1e-14)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-6)])
def test_apply_is_what_it_is_defined_as_and_invert_undoes_it(n, kind, dtype, tolerance):
    """In float64 what is left is the rounding of sines and cosines to float32, of which every length has some."""
    rng = np.random.default_rng(n)
    blinding = Blinding.random(n, rng)
    x = rng.normal(size=(2, 3, n)).astype(dtype)
    given_x = x if kind == "numpy" else torch.from_numpy(x)
    y = blinding.apply(given_x)
    assert type(y) is type(given_x) and y.dtype == given_x.dtype and y.shape == given_x.shape
    assert np.allclose(np.asarray(blinding.invert(y)), x, atol=10 * tolerance)
    assert np.allclose(np.asarray(y), x.astype(np.float64) @ by_definition(blinding).T, atol=10 * tolerance)


def by_definition(blinding: Blinding) -> np.ndarray:
    """The matrix (n, n) of x -> apply(x), as the product of permutations, plane rotations and Hadamard transforms."""
    n = len(blinding)
    whole = np.eye(n)
    for number in range(ROUNDS):
        perm, planes = np.eye(n)[blinding.perm[number]], np.eye(n)
        for i, angle in enumerate(blinding.angle[number].astype(np.float64)):
            j = i + n // 2
            planes[i, i], planes[i, j] = np.cos(angle), -np.sin(angle)
            planes[j, i], planes[j, j] = np.sin(angle), np.cos(angle)
        whole = hadamard(np.eye(n)) @ planes @ perm @ whole
        if number == 0:
            whole = blinding.diagonal[:, None].astype(np.float64) * whole
    return whole


@pytest.mark.parametrize("n", SIZES)
def test_without_the_diagonal_it_is_orthogonal_and_with_it_nearly(n):
    blinding = Blinding.random(n, np.random.default_rng(n))
    stretch = np.linalg.svd(by_definition(blinding), compute_uv=False)
    assert np.allclose(np.sort(stretch), np.sort(blinding.diagonal), rtol=1e-6)
    plain = by_definition(replace(blinding, diagonal=np.ones_like(blinding.diagonal)))
    assert np.allclose(plain @ plain.T, np.eye(n), atol=1e-6)


def test_a_vector_of_a_matrix_and_the_matrix_agree():
    """What the split does to W undoes what encode does to x and decode to y."""
    rng = np.random.default_rng(5)
    inner, outer = Blinding.random(577, rng), Blinding.random(130, rng)
    w, x = torch.randn(130, 577, dtype=torch.float64), torch.randn(577, dtype=torch.float64)
    blinded = blind(w, inner, outer)
    assert torch.allclose(outer.invert(blinded @ inner.apply(x)), w @ x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(unblind(blinded, inner, outer), w, atol=1e-5)
    y = torch.randn(577, dtype=torch.float64)
    assert torch.allclose(inner.dual().apply(y) @ inner.apply(x), y @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
@pytest.mark.parametrize("n", SIZES)
def test_the_native_transform_is_the_same(n):
    rng = np.random.default_rng(n)
    blinding = Blinding.random(n, rng)
    y = rng.integers(-1000, 1000, n)
    for isa in _core.native.isas():
        out = np.zeros((1, n), np.float32)  # decode adds to it
        answer, image = np.mod(y, 2**31 - 1).astype(np.uint32)[None], np.zeros((1, n), np.uint32)
        ones = np.ones((1, n), np.float32)
        secret = blinding.perm, blinding.turns, blinding.diagonal
        u, expected = np.zeros((0, n), np.uint32), np.zeros((1, 0), np.uint32)
        assert _core.native.decode(answer, image, ones, np.ones(1), secret, u, expected, out, isa)
        assert np.allclose(out[0], blinding.invert(y.astype(np.float64)), rtol=1e-6, atol=2e-3)


@pytest.mark.skipif(_core.native is None, reason="no native core")
@pytest.mark.parametrize("wrong", ["rounds", "turns", "diagonal"])
def test_the_native_core_refuses_a_blinding_of_another_size(wrong):
    perm, turns, diagonal = (lambda b: (b.perm, b.turns, b.diagonal))(Blinding.random(64))
    secret = {
        "rounds": (perm[:2].copy(), turns, diagonal),
        "turns": (perm, turns[..., :31].copy(), diagonal),
        "diagonal": (perm, turns, diagonal[:63].copy()),
    }[wrong]
    words, out = np.zeros((1, 64), np.uint32), np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="wrong size"):
        _core.native.decode(words, words, np.ones((1, 64), np.float32), np.ones(1), secret, words, words[:, :1], out)


def test_what_is_drawn():
    a, b = Blinding.random(577), Blinding.random(577)
    assert (np.sort(a.perm) == np.arange(577)).all() and (a.perm[0] != a.perm[1]).any()
    assert a.perm.shape == (ROUNDS, 577) and a.angle.shape == (ROUNDS, 288) and a.diagonal.shape == (577,)
    assert a.perm.dtype == np.int32 and a.angle.dtype == a.diagonal.dtype == np.float32 and len(a) == 577
    assert all((x != y).mean() > 0.99 for x, y in ((a.perm, b.perm), (a.angle, b.angle), (a.diagonal, b.diagonal)))
    turns = np.concatenate([Blinding.random(2000).angle.ravel() for _ in range(10)]) / (2 * np.pi)
    spread = np.log(np.concatenate([Blinding.random(2000).diagonal for _ in range(20)])) / np.log(SPREAD)
    for value, low, high in ((turns, 0, 1), (spread, -1, 1)):  # Kolmogorov and Smirnov: one in a million exceeds 2.7
        ordered = np.sort((value - low) / (high - low))
        assert np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max() * len(ordered) ** 0.5 < 2.7


def test_every_permutation_is_as_likely_as_another():
    rng = np.random.default_rng(1)
    counts: dict = {}
    for _ in range(4800):
        key = tuple(Blinding.random(4, rng).perm[0].tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24 and min(counts.values()) > 130 and max(counts.values()) < 270  # 200 each, +-14


def test_a_bundle_gives_it_back():
    a = Blinding.random(65)
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in a.tensors().items()}
    assert layout == Blinding.layout(65)
    b = Blinding.read(a.tensors().__getitem__)
    assert all((getattr(a, name) == getattr(b, name)).all() for name in layout)


def test_repr_shows_nothing_secret():
    assert repr(Blinding.random(64)) == "Blinding(n=64)" == str(Blinding.random(64))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shape", [(1536, 576), (576, 2048)])
def test_the_diagonal_costs_a_tenth_of_the_quantisation_error_at_most(planes: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.standard_normal(shape))
    errors = []
    for spread in (True, False):
        pair = [Blinding.random(n, np.random.default_rng(1)) for n in (shape[1], shape[0])]
        if not spread:
            pair = [replace(b, diagonal=np.ones_like(b.diagonal)) for b in pair]
        read = dequantise(*quantise(blind(matrix, *pair).float(), planes))
        errors.append(float((unblind(read.double(), *pair) - matrix).norm()))
    assert 1 < errors[0] / errors[1] < 1.1
