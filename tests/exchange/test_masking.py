"""One exchange's arithmetic: what comes out is Q x; nothing overflows; a wrong answer never passes."""

import dataclasses

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
    monkeypatch.setattr(masking, "native", core)
    monkeypatch.setattr(check, "native", core)
    monkeypatch.setattr(field, "native", core)
    return request.param


def operator(k=1, planes=1, n=1, **known):
    """Of a matrix (n, k), with whatever is `known` of it."""
    unknown = {"row_norm": 100.0, "scales": np.ones((planes, n), np.float32), "inner": None, "outer": None}
    unchecked = {"u": np.zeros((0, planes * n), np.uint32), "uq": np.zeros((0, k), np.uint32)}
    return Operator(**{"number": 0, "shape": (planes * n, k)} | unknown | unchecked | known)


def encode(x, r, row_norm, inner):
    return masking.encode(operator(x.shape[1], row_norm=row_norm, inner=inner), x, r)[:2]


def decode(answer, image, scales, inv_c, outer=None):
    out, nothing = np.zeros((len(answer), scales.shape[1]), np.float32), np.zeros((len(answer), 0), np.uint32)
    op = operator(1, *scales.shape, scales=scales, outer=outer)
    assert masking.decode(op, answer, image, inv_c, nothing, out)
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
        self.op = operator(
            k,
            planes,
            n,
            row_norm=row_norm(self.q),
            scales=self.scales,
            inner=self.into,
            outer=self.out,
            u=self.u,
            uq=self.uq,
        )
        self.masked, self.inv_c, self.expected = masking.encode(self.op, self.x, self.r)
        self.answer = exact(self.q, self.masked)

    def check(self, answer):
        return verify(self.u, self.uq, self.masked, answer)

    def decoded(self, answer, image):
        """Whether they pass, and what they become."""
        out = np.zeros((len(self.x), self.scales.shape[1]), np.float32)
        return masking.decode(self.op, answer, image, self.inv_c, self.expected, out), out

    def passes(self, answer, image):
        return self.decoded(answer, image)[0]

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
    right, y = e.decoded(e.answer, e.image)
    assert right and y.shape == (tokens, n) and y.dtype == np.float32
    scale = np.linalg.norm(e.x, axis=1, keepdims=True) * row_norm(e.q) * 3  # what rounding x to integers can do
    assert (np.abs(y - e.wanted()) <= scale * 2e-3 * max(1, k**0.5 * row_norm(e.q) / 1e6)).all()
    if k >= 64:  # typical, rather than worst
        assert np.linalg.norm(y - e.wanted()) < 2e-4 * np.linalg.norm(e.wanted())


@pytest.mark.parametrize("tokens", [1, 4, 31])
def test_what_decode_expects_is_the_check_of_the_encoded_input(tokens):
    e = Exchange(3, 1030, tokens)
    encoded, uq = field.sub(e.masked, e.r).astype(object), e.uq.astype(object)
    assert e.expected.dtype == np.uint32 and (e.expected == encoded @ uq.T % P).all()
    assert (e.expected == field.sub(e.answer, e.image).astype(object) @ e.u.T.astype(object) % P).all()


def test_sums_of_the_largest_products_do_not_overflow():
    """z and u all p - 1, longer than any block of a sum."""
    for k in (1, 31, 32, 33, 300, 65535):
        high = np.full((1, k), P - 1, np.uint32)
        op = operator(1, 1, k, u=np.repeat(high, 2, axis=0), uq=np.zeros((2, 1), np.uint32))
        expected, out = np.full((1, 2), pow(P - 1, 2, P) * k % P, np.uint32), np.zeros((1, k), np.float32)
        assert masking.decode(op, high, np.zeros_like(high), np.ones(1), expected, out)
        assert not masking.decode(op, high, np.zeros_like(high), np.ones(1), expected + np.uint32([[0, 1]]), out)


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


@pytest.mark.parametrize("whose", ["answer", "image"])
def test_decode_refuses_a_wrong_answer_and_a_wrong_image_wherever_it_is_wrong(whose):
    e = Exchange(20, 33, 21)
    right = {"answer": e.answer, "image": e.image}
    assert e.passes(**right)
    for t in (0, 5, 16, 20):
        for m in range(40):
            wrong = right[whose].copy()
            wrong[t, m] = (int(wrong[t, m]) + 1 + 7 * m) % P
            assert not e.passes(**right | {whose: wrong})
            alias = right[whose].copy()
            alias[t, m] += np.uint32(P)  # the same residue, outside the field
            assert not e.passes(**right | {whose: alias})


@pytest.mark.parametrize("whose", ["answer", "image"])
def test_decode_refuses_what_is_misplaced_or_of_another_kind(whose):
    e = Exchange(20, 33, 5)
    right = {"answer": e.answer, "image": e.image}
    part = right[whose]
    swapped = part.copy()
    swapped[[0, 3]] = part[[3, 0]]
    other = exact(e.q, np.roll(e.r, 1, axis=1))
    wrong = [
        swapped,
        part[::-1],
        np.roll(part, 1, axis=1),
        np.zeros_like(part),
        other,
        part[:4],
        part[:, :-1],
        part[:1],
    ]
    for bad in [*wrong, part.astype(np.int64), part.view(np.int32), part.view(np.float32), part.reshape(-1)]:
        assert not e.passes(**right | {whose: bad})
    assert e.passes(**right | {whose: np.asfortranarray(part)})


def test_errors_that_cancel_leave_the_result_right():
    e = Exchange(20, 33, 5)
    errors = np.random.default_rng(1).integers(0, P, e.answer.shape).astype(np.uint32)
    right, y = e.decoded(field.add(e.answer, errors), field.add(e.image, errors))
    assert right and (y == e.decoded(e.answer, e.image)[1]).all()


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("k", [1, 3, 64, 577, 1200])
def test_a_row_s_result_does_not_depend_on_the_rows_beside_it(k, blind):
    """Rows are taken 16, 8, 4 and 1 at a time: 31 rows and then one by one, bit for bit."""
    e = Exchange(k, k, 31, blind=blind)
    together = e.decoded(e.answer, e.image)[1]
    for t in range(31):
        row = slice(t, t + 1)
        alone, out = masking.encode(e.op, e.x[row], e.r[row]), np.zeros((1, k), np.float32)
        for part, whole in zip(alone, (e.masked, e.inv_c, e.expected), strict=True):
            assert np.array_equal(part, whole[row])
        assert masking.decode(e.op, e.answer[row], e.image[row], *alone[1:], out)
        assert np.array_equal(out, together[row])


@pytest.mark.parametrize("k", [33, 577])
def test_every_instruction_set_gives_the_same(path, k, monkeypatch):
    if path == "numpy":
        pytest.skip("rounds in float64")
    e = Exchange(k, k, 13)
    decoded = e.decoded(e.answer, e.image)[1]
    monkeypatch.setattr(masking, "native", Forced("scalar"))
    for part, whole in zip(masking.encode(e.op, e.x, e.r), (e.masked, e.inv_c, e.expected), strict=True):
        assert np.array_equal(part, whole)
    assert np.array_equal(e.decoded(e.answer, e.image)[1], decoded)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, P - 1), st.integers(0, 39), st.integers(0, 2), st.sampled_from(["answer", "image"]))
def test_decode_refuses_any_change(change, row, token, whose):
    e = ANY
    right = {"answer": e.answer, "image": e.image}
    forged = right[whose].copy()
    forged[token, row] = (int(forged[token, row]) + change) % P
    for core in [None] + [Forced(isa) for isa in PATHS[1:]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masking, "native", core)
            assert e.passes(**right) and not e.passes(**right | {whose: forged})


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
    first = dataclasses.replace(e.op, u=e.u[:1], uq=e.uq[:1])
    assert masking.decode(first, forged, e.image, e.inv_c, e.expected[:, :1].copy(), np.zeros((1, 4), np.float32))
    assert not e.passes(forged, e.image)


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
    wanted, wanted_c, *_ = masking._encode(operator(577, row_norm=3000.0, inner=blinding), x, r)
    apart = unmask(masked, r) - unmask(wanted, r)
    assert np.allclose(inv_c, wanted_c, rtol=1e-6)
    # The native core blinds in float32: its rounding stays far below that of fixed point, half a unit.
    assert np.abs(apart).max() <= 1 and np.sqrt(np.square(apart, dtype=float).mean()) < 0.2
    answer, image = (rng.integers(0, P, (9, 2 * 577)).astype(np.uint32) for _ in range(2))
    scales = rng.random((2, 577)).astype(np.float32)
    assert np.allclose(
        decode(answer, image, scales, inv_c, blinding),
        masking._decode(operator(scales=scales, outer=blinding), field.sub(answer, image), inv_c),
        rtol=1e-6,
        atol=1e-6 * inv_c.max() * P,
    )
