"""The secret change of basis: orthogonal, the transform the native code applies, and silent about itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sliplm import _core
from sliplm.split.blinding import ROUNDS, Rotation, block_sizes, hadamard

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
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-14)])
def test_apply_is_orthogonal_and_invert_undoes_it(n, kind, dtype, tolerance):
    rng = np.random.default_rng(n)
    rotation = Rotation.random(n, rng)
    x = rng.normal(size=(2, 3, n)).astype(dtype)
    given_x = x if kind == "numpy" else torch.from_numpy(x)
    y = rotation.apply(given_x)
    assert type(y) is type(given_x) and y.dtype == given_x.dtype and y.shape == given_x.shape
    assert np.allclose(np.linalg.norm(np.asarray(y), axis=-1), np.linalg.norm(x, axis=-1), rtol=10 * tolerance)
    assert np.allclose(np.asarray(rotation.invert(y)), x, atol=10 * tolerance)
    by_definition = x.astype(np.float64)
    for perm, sign in zip(rotation.perm, rotation.sign, strict=True):
        by_definition = hadamard(sign.astype(np.float64) * by_definition[..., perm])
    assert np.allclose(np.asarray(y), by_definition, atol=10 * tolerance)


def test_a_vector_of_a_matrix_and_the_matrix_agree():
    """W x = (W R^T)(R x): what the splitter does to W undoes what encode does to x."""
    rng = np.random.default_rng(5)
    into, out = Rotation.random(577, rng), Rotation.random(130, rng)
    w, x = torch.randn(130, 577, dtype=torch.float64), torch.randn(577, dtype=torch.float64)
    blinded = out.apply(into.apply(w).T).T
    assert torch.allclose(out.invert(blinded @ into.apply(x)), w @ x)


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
@pytest.mark.parametrize("n", SIZES)
def test_the_native_transform_is_the_same(n):
    rng = np.random.default_rng(n)
    rotation = Rotation.random(n, rng)
    y = rng.integers(-1000, 1000, n)
    for isa in _core.native.isas():
        out = np.zeros((1, n), np.float32)  # decode adds to it
        answer, image = np.mod(y, 2**31 - 1).astype(np.uint32)[None], np.zeros((1, n), np.uint32)
        ones = np.ones((1, n), np.float32)
        _core.native.decode(answer, image, ones, np.ones(1), rotation.perm, rotation.sign, out, isa)
        assert np.allclose(out[0], rotation.invert(y.astype(np.float64)), rtol=1e-6, atol=1e-4)


def test_random_rotations_differ_and_are_permutations():
    a, b = Rotation.random(577), Rotation.random(577)
    assert (np.sort(a.perm) == np.arange(577)).all() and set(a.sign.flatten().tolist()) == {-1.0, 1.0}
    assert (a.perm != b.perm).any() and (a.sign != b.sign).any() and (a.perm[0] != a.perm[1]).any()
    assert a.perm.shape == a.sign.shape == (ROUNDS, 577) and len(a) == 577
    assert a.perm.dtype == np.int32 and a.sign.dtype == np.float32


def test_every_permutation_and_sign_is_as_likely_as_another():
    rng = np.random.default_rng(1)
    counts: dict = {}
    for _ in range(4800):
        rotation = Rotation.random(3, rng)
        key = (*rotation.perm[0].tolist(), *rotation.sign[0].tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 48 and min(counts.values()) > 50 and max(counts.values()) < 160  # 100 each, +-10


def test_repr_shows_nothing_secret():
    assert repr(Rotation.random(64)) == "Rotation(n=64)" == str(Rotation.random(64))
