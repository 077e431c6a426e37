"""F_p arithmetic against Python's integers, on both the native and the portable path."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm import _core, field
from sliplm.field import HALF, P

EDGES = np.array([0, 1, 2, 0xFF, 0x100, 0xFFFF, 0x10000, HALF - 1, HALF, HALF + 1, P - 2, P - 1], np.uint32)
elements = st.integers(0, P - 1) | st.sampled_from([int(e) for e in EDGES])


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(field, "native", None)
    elif _core.native is None:
        pytest.skip("no native core: install a C++20 compiler")
    return request.param


def random_elements(rng, shape):
    x = rng.integers(0, P, shape).astype(np.uint32)
    flat = x.reshape(-1)
    flat[: len(EDGES)] = EDGES[: len(flat)]
    return x


def test_add_sub_and_centre_on_all_pairs_of_edges():
    a, b = EDGES[:, None].astype(object), EDGES[None, :].astype(object)
    assert (field.add(EDGES[:, None], EDGES[None, :]) == (a + b) % P).all()
    assert (field.sub(EDGES[:, None], EDGES[None, :]) == (a - b) % P).all()
    centred = field.centre(EDGES)
    assert abs(centred.astype(np.int64)).max() <= HALF
    assert (field.lift(centred) == EDGES).all()
    assert field.add(EDGES, EDGES).dtype == field.sub(EDGES, EDGES).dtype == np.uint32


@given(elements, elements)
def test_add_undoes_sub(a, b):
    x, y = np.array([a], np.uint32), np.array([b], np.uint32)
    assert field.add(field.sub(x, y), y)[0] == a
    assert field.sub(field.add(x, y), y)[0] == a


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_lift_is_pythons_modulo(values):
    assert field.lift(np.array(values, np.int64)).tolist() == [v % P for v in values]


def test_canonical_finds_one_bad_element_anywhere(path):
    for n in (1, 2, 63, 64, 65, 1000):
        x = np.full(n, P - 1, np.uint32)
        assert field.is_canonical(x)
        for i in {0, n // 2, n - 1}:
            for bad in (P, P + 1, 2**32 - 1):
                y = x.copy()
                y[i] = bad
                assert not field.is_canonical(y)
    grid = np.zeros((4, 6), np.uint32)
    grid[:, 5] = P
    assert field.is_canonical(grid[:, :5]) and not field.is_canonical(grid[:, 1:])  # not contiguous either


@pytest.mark.parametrize("m", [1, 2, 63, 65, 1000, (1 << 16) + 3])
def test_dot_is_exact(m):
    rng = np.random.default_rng(m)
    u, y = random_elements(rng, (2, m)), random_elements(rng, (3, m))
    y[0], u[0] = P - 1, P - 1
    exact = np.array([[sum(map(int.__mul__, a, b)) % P for b in u.tolist()] for a in y.tolist()])
    assert (field.dot(u, y) == exact).all()
    assert (field.dot(u[1], y) == exact[:, 1]).all()


@pytest.mark.parametrize(
    ("m", "k", "checks"),
    [(1, 1, 1), (17, 65, 2), (300, 130, 3), (70_001, 5, 2), (3, 65_535, 1), (2100, 2049, 2)],
)
def test_project_is_exact(path, m, k, checks):
    rng = np.random.default_rng(k)
    u, q = random_elements(rng, (checks, m)), rng.integers(-128, 128, (m, k)).astype(np.int8)
    u[0], u[-1], q[:, 0], q[:, -1] = (
        P - 1,
        HALF,
        -128,
        127,
    )  # the last sum is odd, and for 70,001 rows above 2^53
    low, high = (u & 0xFFFF).astype(np.int64) @ q, (u >> 16).astype(np.int64) @ q
    exact = (low + (high << 16)) % P  # below 2^16 * 2^7 * 2^17 + 2^56: fits
    assert (field.project(u, q) == exact).all()


def test_project_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match="cannot multiply"):
        field.project(np.zeros((1, 3), np.uint32), np.zeros((4, 2), np.int8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(elements, st.integers(-128, 127)), min_size=1, max_size=50))
def test_project_on_every_instruction_set(pairs):
    if _core.native is None:
        pytest.skip("no native core: install a C++20 compiler")
    u = np.array([[a for a, _ in pairs]], np.uint32)
    q = np.array([[b] for _, b in pairs], np.int8)
    for isa in _core.native.isas():
        out = np.empty((1, 1), np.uint32)
        _core.native.project(u, q, out, isa)
        assert out[0, 0] == sum(a * b for a, b in pairs) % P
