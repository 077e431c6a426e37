"""One exchange's arithmetic: what comes out is Q x; nothing overflows; a wrong answer never passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm import _core, field
from sliplm.errors import NumericsError
from sliplm.exchange import check, masking
from sliplm.exchange.operator import Operator
from sliplm.field import HALF, P
from sliplm.split.blinding import Blinding

PATHS = ["numpy"] + (_core.native.isas() if _core.native else [])


class Forced:
    """The native module, held to one instruction set."""

    def __init__(self, isa):
        self.isa = isa

    def __getattr__(self, name):
        function = getattr(_core.native, name)
        return function if name == "is_canonical" else lambda *args: function(*args, self.isa)


@pytest.fixture(params=PATHS, autouse=True)
def path(request, monkeypatch):
    core = None if request.param == "numpy" else Forced(request.param)
    monkeypatch.setattr(check, "native", core)
    monkeypatch.setattr(check, "native", core)
    monkeypatch.setattr(field, "native", core)
    return request.param


def operator(k=1, planes=1, n=1, **known):
    """Of a matrix (n, k), with whatever is `known` of it."""
    unknown = {"row_norm": 100.0, "scales": np.ones((planes, n), np.float32), "inner": None, "outer": None}
    return Operator(**{"number": 0, "shape": (planes * n, k), "u": None, "uq": None} | unknown | known)


def encode(x, r, row_norm, inner):
    return masking.encode(operator(x.shape[1], row_norm=row_norm, inner=inner), x, r)


def decode(answer, image, scales, inv_c, outer=None):
    out = np.zeros((len(answer), scales.shape[1]), np.float32)
    masking.decode(operator(scales=scales, outer=outer), answer, image, inv_c, out)
    return out


def verify(u, uq, masked, answer):
    return check.check(operator(masked.shape[1], 1, u.shape[1], u=u, uq=uq), masked, answer)


def row_norm(q):
    return float(np.sqrt((q.astype(np.int64) ** 2).sum(axis=1).max()))


def exact(q, x):
    low, high = (
        (x & 0xFFFF).astype(np.int64) @ q.T.astype(np.int64),
        (x >> 16).astype(np.int64) @ q.T.astype(np.int64),
    )
    return ((low + (high << 16)) % P).astype(np.uint32)


def unmask(masked, r):
    return field.centre(field.sub(masked, r)).astype(np.int64)


class Exchange:
    """A matrix, a pad, a check vector and an input, and the edge's honest answer."""

    def __init__(self, n, k, tokens, planes=2, blind=True, checks=2):
        rng = np.random.default_rng([n, k, tokens])
        self.q = rng.integers(-128, 128, (planes * n, k)).astype(np.int8)
        self.scales = (rng.random((planes, n)) + 0.5).astype(np.float32)
        self.x = rng.normal(size=(tokens, k)).astype(np.float32)
        self.r = rng.integers(0, P, (tokens, k)).astype(np.uint32)
        self.image = exact(self.q, self.r)
        self.u = rng.integers(0, P, (checks, planes * n)).astype(np.uint32)
        self.uq = field.project(self.u, self.q)
        self.into, self.out = (Blinding.random(k, rng), Blinding.random(n, rng)) if blind else (None, None)
        self.masked, self.inv_c = encode(self.x, self.r, row_norm(self.q), self.into)
        self.answer = exact(self.q, self.masked)

    def check(self, answer):
        return verify(self.u, self.uq, self.masked, answer)

    def wanted(self):
        planes, n = self.scales.shape
        w = (self.scales.astype(np.float64)[:, :, None] * self.q.reshape(planes, n, -1)).sum(axis=0)
        x = self.x.astype(np.float64)
        y = (x if self.into is None else self.into.apply(x)) @ w.T
        return y if self.out is None else self.out.invert(y)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize(("n", "k", "tokens"), [(1, 1, 1), (7, 3, 2), (65, 64, 1), (100, 577, 5), (64, 2048, 33)])
def test_an_exchange_computes_the_product(n, k, tokens, blind):
    e = Exchange(n, k, tokens, blind=blind)
    assert field.is_canonical(e.masked) and e.inv_c.shape == (tokens,)
    assert e.check(e.answer)
    y = decode(e.answer, e.image, e.scales, e.inv_c, e.out)
    assert y.shape == (tokens, n) and y.dtype == np.float32
    scale = np.linalg.norm(e.x, axis=1, keepdims=True) * row_norm(e.q) * 3  # what rounding x to integers can do
    assert (np.abs(y - e.wanted()) <= scale * 2e-3 * max(1, k**0.5 * row_norm(e.q) / 1e6)).all()
    if k >= 64:  # typical, rather than worst
        assert np.linalg.norm(y - e.wanted()) < 2e-4 * np.linalg.norm(e.wanted())


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_decode_is_exact_but_for_one_rounding(planes):
    rng = np.random.default_rng(planes)
    answer, image = (rng.integers(0, P, (4, planes * 50)).astype(np.uint32) for _ in range(2))
    answer[0, :6], image[0, :6] = [0, P - 1, HALF, HALF + 1, 0, 5], [P - 1, 0, 0, 0, 0, 5]
    scales, inv_c = rng.random((planes, 50)).astype(np.float32), rng.random(4)
    z = np.mod(answer.astype(np.int64) - image, P)
    z = np.where(z > HALF, z - P, z).reshape(4, planes, 50)
    want = inv_c[:, None] * (z * scales.astype(np.float64)).sum(axis=1)
    assert np.allclose(decode(answer, image, scales, inv_c), want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 63, 576, 4095, 65535])
def test_nothing_overflows_even_for_the_worst_input(k):
    """x along a row of Q, the largest one: Cauchy-Schwarz is then an equality, and rounding comes on top."""
    rng = np.random.default_rng(k)
    q = rng.integers(-128, 128, (8, k)).astype(np.int8)
    q[0], q[1], q[2] = 127, -128, np.where(rng.random(k) < 0.5, 127, -128)
    x = np.concatenate([q, q + rng.normal(size=q.shape) * 1e-3, np.sign(q), q * 1e30, q * 1e-40]).astype(np.float32)
    r = rng.integers(0, P, x.shape).astype(np.uint32)
    masked, _ = encode(x, r, row_norm(q), None)
    z = unmask(masked, r) @ q.T.astype(np.int64)
    assert np.abs(z).max() <= HALF
    assert np.abs(z).max() > 0.98 * HALF - row_norm(q) * k**0.5  # and the range is used: the bound is no idle one


@pytest.mark.parametrize("k", [1, 65, 577])
def test_encode_rounds_the_rotated_input_scaled_by_c(k):
    rng = np.random.default_rng(k)
    x, r = rng.normal(size=(6, k)).astype(np.float32), rng.integers(0, P, (6, k)).astype(np.uint32)
    blinding = Blinding.random(k, rng)
    masked, inv_c = encode(x, r, 5000.0, blinding)
    v = blinding.apply(x.astype(np.float64))
    c = (HALF / 5000 - k**0.5 / 2) / np.linalg.norm(v, axis=1)
    assert np.allclose(inv_c, 1 / c, rtol=1e-6)
    # v is blinded in float32 by the native core: off by some 3e-7 of the largest entries, half a unit at this size.
    assert np.abs(unmask(masked, r) - v / inv_c[:, None]).max() <= 0.5 + 1e-6 * np.abs(v / inv_c[:, None]).max()
    assert (field.add(r, field.lift(unmask(masked, r))) == masked).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_exactly_p_is_zero(sign):
    x, zero = np.full((1, 1), sign, np.float32), np.zeros((1, 1), np.uint32)
    r = field.sub(zero, encode(x, zero, 100.0, None)[0])
    assert encode(x, r, 100.0, None)[0][0, 0] == 0
    for off in (1, P - 1):
        assert encode(x, field.add(r, np.full_like(r, off)), 100.0, None)[0][0, 0] == off


def test_a_zero_vector_is_sent_as_its_pad():
    r = np.arange(10, dtype=np.uint32)[None]
    masked, inv_c = encode(np.zeros((1, 10), np.float32), r, 100.0, None)
    assert (masked == r).all() and inv_c[0] == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("blind", [False, True])
def test_what_is_not_finite_is_refused(value, blind):
    for at in (0, 64, 69):
        x = np.ones((3, 70), np.float32)
        x[1, at] = value
        with pytest.raises(NumericsError, match="finite"):
            encode(x, np.zeros((3, 70), np.uint32), 100.0, Blinding.random(70) if blind else None)


def test_finite_but_huge_is_not_refused():
    x = np.full((1, 600), np.finfo(np.float32).max)
    masked, inv_c = encode(x, np.zeros((1, 600), np.uint32), 100.0, Blinding.random(600))
    assert np.isfinite(inv_c).all() and inv_c[0] > 0 and field.is_canonical(masked)


def test_a_matrix_that_leaves_no_room_is_refused():
    with pytest.raises(NumericsError, match="no room"):
        encode(np.ones((1, 4), np.float32), np.zeros((1, 4), np.uint32), 2.0**31, None)


def test_a_matrix_of_zeros_is_fine():
    masked, inv_c = encode(np.ones((1, 4), np.float32), np.zeros((1, 4), np.uint32), 0.0, None)
    assert field.is_canonical(masked) and inv_c[0] > 0


def test_verify_catches_every_single_bit_and_every_power_of_two():
    e = Exchange(20, 33, 3)
    assert e.check(e.answer)
    for t, m in [(0, 0), (1, 17), (2, 39)]:
        for bit in range(32):
            flipped = e.answer.copy()
            flipped[t, m] ^= np.uint32(1 << bit)
            assert not e.check(flipped)
        for k in range(31):
            shifted = e.answer.copy()
            shifted[t, m] = (int(shifted[t, m]) + (1 << k)) % P
            assert not e.check(shifted)


def test_verify_catches_swaps_wrong_tokens_and_equal_but_not_canonical_values():
    e = Exchange(20, 33, 3)
    assert not e.check(e.answer[::-1].copy())
    assert not e.check(np.roll(e.answer, 1, axis=1))
    assert not e.check(np.zeros_like(e.answer))
    assert not e.check(e.answer[:2]) and not e.check(e.answer[:, :-1].copy())
    alias = e.answer.copy()
    alias[0, 0] += np.uint32(P)  # the same residue, outside the field
    assert not e.check(alias)


def test_each_check_vector_counts():
    """An error orthogonal to the first check vector passes it; the second catches it."""
    e = Exchange(4, 5, 1)
    a, b = int(e.u[0, 0]), int(e.u[0, 1])
    forged = e.answer.copy()
    forged[0, 0] = (int(forged[0, 0]) + b) % P
    forged[0, 1] = (int(forged[0, 1]) - a) % P
    assert verify(e.u[:1], e.uq[:1], e.masked, forged)
    assert not e.check(forged)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, P - 1), st.integers(0, 39), st.integers(0, 2))
def test_verify_catches_any_change(change, row, token):
    e = ANY
    forged = e.answer.copy()
    forged[token, row] = (int(forged[token, row]) + change) % P
    for core in [None] + [Forced(isa) for isa in PATHS[1:]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(check, "native", core)
            assert e.check(e.answer) and not e.check(forged)


ANY = Exchange(20, 33, 3)


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
def test_native_and_numpy_agree(path):
    if path == "numpy":
        pytest.skip("compared with")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(9, 577)) * 10.0 ** rng.integers(-6, 6, (9, 1))).astype(np.float32)
    r = rng.integers(0, P, x.shape).astype(np.uint32)
    blinding = Blinding.random(577, rng)
    masked, inv_c = encode(x, r, 3000.0, blinding)
    wanted, wanted_c, _ = masking._encode(operator(577, row_norm=3000.0, inner=blinding), x, r)
    apart = unmask(masked, r) - unmask(wanted, r)
    assert np.allclose(inv_c, wanted_c, rtol=1e-6)
    # The native core blinds in float32: its rounding stays far below that of fixed point, half a unit.
    assert np.abs(apart).max() <= 1 and np.sqrt(np.square(apart, dtype=float).mean()) < 0.2
    answer, image = (rng.integers(0, P, (9, 2 * 577)).astype(np.uint32) for _ in range(2))
    scales = rng.random((2, 577)).astype(np.float32)
    assert np.allclose(
        decode(answer, image, scales, inv_c, blinding),
        masking._decode(operator(scales=scales, outer=blinding), answer, image, inv_c),
        rtol=1e-6,
        atol=1e-6 * inv_c.max() * P,
    )
