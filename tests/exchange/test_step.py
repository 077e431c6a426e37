"""One exchange, whole: what comes out, and what comes of a lie, a lost link and missing pads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from layers import COLUMNS, ROWS, Layer, inputs

from sliplm import kernels
from sliplm.errors import BundleError, BusyError, LinkError, SlipError, VerificationError
from sliplm.exchange import check
from sliplm.exchange.link import InProcessLink, Link
from sliplm.exchange.measured import Measured
from sliplm.exchange.operator import Operator
from sliplm.exchange.step import STEPS, exchange
from sliplm.field import P
from sliplm.pads.pool import Pool
from sliplm.pads.sources import SelfSource
from sliplm.prg import expand
from sliplm.trusted.runtime import Runtime

torch = pytest.importorskip("torch")


class Edge(InProcessLink):
    """Multiplies, counts, and may lie."""

    def __init__(self, matrices: list[kernels.IntMatrix], lie: bool = False) -> None:
        super().__init__(self)
        self.matrices, self.lie, self.seen, self.closed = matrices, lie, list[np.ndarray](), False

    def product(self, group: int, x: np.ndarray) -> np.ndarray:
        self.seen.append(x.copy())
        y = self.matrices[group].product(x)
        y[-1, -1] ^= np.uint32(self.lie)
        return y

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_an_exchange_gives_the_edges_part_and_our_own(planes: int, rows: int) -> None:
    layer, x = Layer(planes), inputs(rows)
    link = Edge(layer.matrices)
    y = exchange(layer.op, x, layer.pads, link, layer.own)
    assert y.dtype == np.float32 and np.allclose(y, layer.wanted(x), rtol=0, atol=2e-4)
    assert len(link.seen) == 1 and link.seen[0].shape == x.shape


def test_an_operator_goes_through_a_bundle_and_its_repr_has_no_secret() -> None:
    op = Layer().op
    layout, tensors = Operator.layout(2, ROWS, COLUMNS, True), op.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout and list(tensors) == list(layout)
    again, x = Operator.load(0, tensors), inputs(1)
    assert again.shape == op.shape and again.row_norm == op.row_norm and repr(op) == "Operator(0, shape=(80, 30))"
    assert (again.u == op.u).all() and (again.uq == op.uq).all() and (again.inner.apply(x) == op.inner.apply(x)).all()


def test_check_secrets_are_fresh_uniform_and_belong_to_the_matrix() -> None:
    q = np.random.default_rng(0).integers(-128, 128, (70, 33)).astype(np.int8)
    (u, uq), (other, _) = check.secrets(q), check.secrets(q)
    assert u.shape == (check.CHECKS, 70) and not (u == other).any()
    assert (uq.astype(object) == u.astype(object) @ q.astype(object) % (2**31 - 1)).all()


@pytest.mark.parametrize("how", [exchange, Measured().exchange])
def test_a_lie_ends_the_link_and_gives_nothing(how: Any) -> None:
    layer = Layer()
    link = Edge(layer.matrices, lie=True)
    with pytest.raises(VerificationError):
        how(layer.op, inputs(3), layer.pads, link, layer.own)
    assert link.closed


@pytest.mark.parametrize("how", [exchange, Measured().exchange])
def test_a_lie_about_any_part_of_a_long_input_ends_it(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    monkeypatch.setitem(vars(layer.op), "rows", 2)

    class Late(Edge):
        def product(self, group: int, x: np.ndarray) -> np.ndarray:
            self.lie = len(self.seen) == 2
            return super().product(group, x)

    link = Late(layer.matrices)
    with pytest.raises(VerificationError):
        how(layer.op, inputs(9), layer.pads, link, layer.own)
    assert link.closed and len(link.seen) == 3


def test_a_part_whose_pad_is_wrong_is_done_again_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(), inputs(9)
    monkeypatch.setitem(vars(layer.op), "rows", 2)
    image, made = layer.pads.own.image, list[int]()

    def lying(*arguments: Any) -> np.ndarray:
        made.append(0)
        right = image(*arguments)
        right[0, 3] ^= np.uint32(len(made) == 2)
        return right

    rejected = list[bool]()
    monkeypatch.setattr(layer.pads.own, "image", lying)
    monkeypatch.setattr(layer.pads.own, "reject", lambda: rejected.append(True))
    link = Edge(layer.matrices)
    y = exchange(layer.op, x, layer.pads, link, layer.own)
    assert np.allclose(y, layer.wanted(x), rtol=0, atol=2e-4)
    assert rejected == [True] and not link.closed and [len(x) for x in link.seen] == [2, 2, 2, 2, 1, 2]
    assert not (link.seen[1] == link.seen[5]).any()


class Maker:
    """Makes pads of a party, wrong in one place if it is told to."""

    def __init__(self, pool: Pool, party: str, wrong: bool) -> None:
        self.pool, self.name, self.parties, self.wrong = pool, party, frozenset({party}), wrong
        self.rejected = 0

    def reject(self) -> None:
        self.rejected += 1
        self.pool.drop(self.name)

    def fill(self, layer: Layer) -> None:
        self.pool.hire(self)
        while job := self.pool.job(self, 0):
            images = layer.matrices[0].product(expand(job.key, 0, job.count, COLUMNS))
            if self.wrong:
                images[:, 7] = (images[:, 7] + 1) % P
            self.pool.deliver(job, images)


@pytest.mark.parametrize("how", [exchange, Measured().exchange])
def test_a_makers_lie_costs_it_its_pads_and_nobody_the_result(how: Any) -> None:
    layer, x = Layer(), inputs(20)
    pool = Pool([layer.op.shape], depth=16, batch=16, patience=0.1)
    pool.expected = True
    liar, honest = Maker(pool, "liar", True), Maker(pool, "honest", False)
    liar.fill(layer), honest.fill(layer)
    link = Edge(layer.matrices)
    pool.take(0, 3, None)  # so that the twenty rows come from both makers
    with pytest.raises(BusyError):  # what was right of them is used up, too: pads are never used again
        how(layer.op, x, pool, link, layer.own)
    assert (liar.rejected, honest.rejected, link.closed) == (1, 0, False)
    honest.fill(layer)
    y = how(layer.op, x[:9], pool, link, layer.own)
    assert np.allclose(y, layer.wanted(x[:9]), rtol=0, atol=2e-4)
    assert len({row.tobytes() for seen in link.seen for row in seen}) == 29  # nothing was masked twice alike


def test_the_edge_is_accused_before_the_maker() -> None:
    layer = Layer()
    pool = Pool([layer.op.shape], depth=16, batch=16, patience=0.1)
    pool.expected = True
    liar = Maker(pool, "liar", True)
    liar.fill(layer)
    link = Edge(layer.matrices, lie=True)
    with pytest.raises(VerificationError):
        exchange(layer.op, inputs(3), pool, link, layer.own)
    assert link.closed and not liar.rejected


def test_lies_that_cancel_leave_the_result_right() -> None:
    """The edge's answer and the image are off by the same: what is used is right, so nobody needs to know."""

    class Shifted(Edge):
        def product(self, group: int, x: np.ndarray) -> np.ndarray:
            y = super().product(group, x)
            y[:, 7] = (y[:, 7] + 1) % P
            return y

    layer, x = Layer(), inputs(3)
    pool = Pool([layer.op.shape], depth=16, batch=16, patience=0.1)
    pool.expected = True
    Maker(pool, "liar", True).fill(layer)
    y = exchange(layer.op, x, pool, Shifted(layer.matrices), layer.own)
    assert np.allclose(y, layer.wanted(x), rtol=0, atol=2e-4)


def test_a_failure_without_a_liar_is_an_error_and_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    steps = STEPS._replace(decode=lambda *_: False)
    with pytest.raises(SlipError, match="computes wrongly"):
        exchange(layer.op, inputs(3), layer.pads, Edge(layer.matrices), layer.own, steps)


def test_every_exchange_has_pads_of_its_own() -> None:
    layer, x = Layer(), inputs(4)
    link = Edge(layer.matrices)
    for _ in range(2):
        exchange(layer.op, x, layer.pads, link, layer.own)
    assert not (link.seen[0] == link.seen[1]).any()


def test_measuring_changes_nothing_and_counts_every_step() -> None:
    layer, x, measured = Layer(), inputs(4), Measured()
    y = measured.exchange(layer.op, x, layer.pads, Edge(layer.matrices), layer.own)
    assert np.allclose(y, layer.wanted(x), rtol=0, atol=2e-4)
    spent = measured.spent
    assert list(spent) == ["pads", "encode", "link", "own", "decode"] and min(spent.values()) > 0
    assert spent["own"] < spent["link"]


class Runs:
    """A runtime with one layer, and what its trusted part was asked for."""

    def __init__(self) -> None:
        self.layer, self.asked = Layer(), list[int]()
        self.runtime = Runtime([self.layer.op], bytes(32))

    def own(self, x: np.ndarray) -> np.ndarray:
        self.asked.append(len(x))
        return self.layer.own(x)

    def product(self, rows: int) -> np.ndarray:
        return self.runtime.product(self.layer.op, inputs(rows), self.own)


def test_long_inputs_take_several_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    monkeypatch.setitem(vars(runs.layer.op), "rows", 16)
    runs.runtime.attach(SelfSource(runs.layer.matrices))
    link = Edge(runs.layer.matrices)
    for rows, parts, ours in (
        (0, [], [0]),
        (1, [1], [1]),
        (16, [16], [16]),
        (17, [16, 1], [17]),
        (40, [16, 16, 8], [40]),
        (150, [16] * 9 + [6], [128, 22]),  # others have the link in between
    ):
        runs.asked.clear(), link.seen.clear()
        with runs.runtime.using(link):
            y = runs.product(rows)
        assert runs.asked == ours and [len(x) for x in link.seen] == parts
        assert np.allclose(y, runs.layer.wanted(inputs(rows)), rtol=0, atol=2e-4)
    counters = runs.runtime.counters
    assert (counters.exchanges, counters.rows) == (17, 224) and counters.exchange > 0
    assert (counters.sent, counters.received) == (224 * 4 * COLUMNS, 224 * 8 * ROWS)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4096, 28672), (65535, 1 << 20)])
def test_no_exchange_is_larger_than_a_frame(columns: int, rows: int) -> None:
    unknown: Any = None
    op = Operator(0, (rows, columns), 1.0, unknown, None, None, unknown, unknown)
    assert 1 <= op.rows <= 512 and (op.rows == 1 or 4 * op.rows * max(rows, columns) <= 32 << 20)


def test_a_lost_context_is_an_error_and_no_local_computation() -> None:
    """A server gives its model pads and no default link: what has lost its request's link must fail."""
    runs = Runs()
    runs.runtime.make_pads(SelfSource(runs.layer.matrices))
    with pytest.raises(LinkError, match="no edge is connected"):
        runs.product(1)
    link: Link = Edge(runs.layer.matrices)
    with runs.runtime.using(link):
        runs.product(1)
    with pytest.raises(LinkError, match="no edge is connected"):
        runs.product(1)
    assert runs.asked == [1]


def test_without_pads_nothing_is_sent() -> None:
    runs = Runs()
    link = Edge(runs.layer.matrices)
    with runs.runtime.using(link), pytest.raises(LinkError, match="nobody makes one-time pads"):
        runs.product(1)
    assert not link.seen and not runs.asked


def test_whoever_makes_pads_gets_every_group_right_first() -> None:
    """Or the first exchange would fail, and after it all."""
    runs = Runs()
    wrong = np.array(runs.layer.q)
    wrong[3, 4] += 1 if wrong[3, 4] < 127 else -1
    with pytest.raises(BundleError, match="is not what the trusted one was split with"):
        runs.runtime.make_pads(SelfSource([kernels.prepare(wrong)]))
    assert runs.runtime.pool.own is None
    runs.runtime.make_pads(SelfSource(runs.layer.matrices))


def damaged(name: str, change: Any) -> dict[str, Any]:
    tensors = Layer().op.tensors()
    values = tensors[name].numpy().copy()
    change(values)
    return tensors | {name: torch.from_numpy(values)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("check_u", lambda u: u.fill(0)),
        ("check_u", lambda u: u[1].fill(0)),
        ("check_u", lambda u: u.__setitem__((0, 0), -1)),
        ("check_uq", lambda uq: uq.__setitem__((1, 2), -5)),
        ("in_perm", lambda perm: perm.__setitem__((2, 0), 1 << 20)),
        ("in_perm", lambda perm: perm.__setitem__((0, 0), perm[0, 1])),
        ("out_perm", lambda perm: perm.__setitem__((3, 5), -1)),
        ("in_diagonal", lambda diagonal: diagonal.__setitem__(0, 0)),
        ("out_diagonal", lambda diagonal: diagonal.__setitem__(7, np.nan)),
        ("out_angle", lambda angle: angle.__setitem__((0, 0), np.inf)),
    ],
)
def test_damaged_secrets_are_refused(name: str, change: Any) -> None:
    """A check with zeros accepts anything, and the native core goes where a permutation says."""
    Operator.load(0, Layer().op.tensors())
    with pytest.raises(BundleError, match="damaged"):
        Operator.load(0, damaged(name, change))


def test_an_operator_is_not_copied() -> None:
    with pytest.raises(TypeError, match="secrets"):
        copy.deepcopy(Layer().op)
