"""Several edges behind one exchange: the same numbers as one gives, whatever the others do meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from edges_fakes import Fake, all_seen, know, pool_of_edges, quickened, run
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, inputs

from sliplm.errors import LinkError, NoWorkerError, NumericsError, VerificationError
from sliplm.exchange import edges as module
from sliplm.exchange import shares
from sliplm.exchange.edges import Edges
from sliplm.exchange.measured import Measured
from sliplm.exchange.step import exchange
from sliplm.pads.pool import Pool
from sliplm.trusted.runtime import Runtime


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from quickened(monkeypatch)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


@pytest.mark.parametrize("how", [exchange, Measured().exchange])
@pytest.mark.parametrize("rows", [2, 3, 7, 20, 300, 2500])
def test_rows_over_three_edges_give_what_one_gives_bit_by_bit(layer: Layer, rows: int, how: Any) -> None:
    links = [Fake(layer) for _ in range(3)]
    edges, x = pool_of_edges(*links), inputs(rows)
    know(edges, 1.0, 1.2, 1.1)
    y = run(edges, layer, x, step=how)
    assert np.array_equal(y, exchange(layer.op, x, layer.pads, Fake(layer), layer.own))
    assert sum(edges.rows.values()) == rows and sum(count > 0 for count in edges.rows.values()) == min(rows, 3)
    assert len(set(all_seen(*links))) == rows  # each is masked once


def test_the_trusted_part_is_computed_once_in_the_callers_thread(layer: Layer) -> None:
    links, called = [Fake(layer, delay=0.2) for _ in range(3)], list[tuple[int, bool, int]]()
    edges = pool_of_edges(*links)
    know(edges, 1.0, 1.0, 1.0)

    def own(x: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        called.append((len(x), threading.current_thread() is threading.main_thread(), sum(len(k.seen) for k in links)))
        return layer.own(x)

    edges.run(exchange, layer.op, inputs(9), layer.pads, own)
    assert called == [(9, True, 3)]  # all three edges were busy


def test_the_shares_follow_the_speeds(layer: Layer) -> None:
    slow, fast = Fake(layer, delay=0.02), Fake(layer, delay=0.02)
    edges = pool_of_edges(slow, fast)
    know(edges, 3.0, 1.0)
    run(edges, layer, inputs(40))
    assert [len(x) for x in slow.seen] == [10] and [len(x) for x in fast.seen] == [30]


def test_one_row_goes_to_the_fastest_and_others_are_tried_now_and_then(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRY_SECONDS", 0.05)
    slow, fast = Fake(layer, delay=0.01), Fake(layer)
    edges = pool_of_edges(slow, fast)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        run(edges, layer, inputs(1))
    assert 1 < len(slow.seen) - shares.NEW < 8  # after half a second each, for ten milliseconds of it
    assert len(fast.seen) > 10 * len(slow.seen)
    slow.delay, fast.delay = 0.0, 0.01  # and now the other way round
    before = len(slow.seen)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        run(edges, layer, inputs(1))
    assert len(slow.seen) - before > 100


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9, 15, 16, 40, 300])
def test_a_new_edge_gets_some_of_any_number_of_rows(layer: Layer, rows: int) -> None:
    old, new = Fake(layer), Fake(layer)
    edges, x = pool_of_edges(old), inputs(rows)
    know(edges, 1e-6)
    edges.add(new, "new")
    for _ in range(12):
        assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)
    assert len(new.seen) >= shares.NEW and all(len(x) for x in (*old.seen, *new.seen))


FAULTS = ["", "die", "die late", "lie", "stall"]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("first", "second"), itertools.product(FAULTS[1:], FAULTS))
def test_whatever_two_of_three_do_the_answers_are_right(layer: Layer, first: str, second: str, rows: int) -> None:
    for at in ((0, 0), (2, 1)) if "stall" in (first, second) else ((0, 0), (1, 0), (0, 1), (2, 1)):
        links = [Fake(layer, first, at[0]), Fake(layer, second, at[1]), Fake(layer)]
        edges = pool_of_edges(*links)
        know(edges, 1e-3, 1.5e-3, 2e-3)
        for i in range(3):
            x = inputs(rows + i)
            assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)
        assert [link.lies for link in links] == [link.fault == "lie" and not link.alive for link in links]
        assert edges.replaced == sum(not link.alive for link in links) > 0
        seen = all_seen(*links)
        assert len(set(seen)) == len(seen)  # no two saw the same masked row


def test_a_liar_among_three_is_named(layer: Layer) -> None:
    links = [Fake(layer), Fake(layer, "lie"), Fake(layer)]
    edges = pool_of_edges(*links)
    know(edges, 1.0, 1.0, 1.0)
    x = inputs(9)
    assert np.array_equal(run(edges, layer, x), exchange(layer.op, x, layer.pads, Fake(layer), layer.own))
    assert [link.lies for link in links] == [0, 1, 0] and [link.alive for link in links] == [True, False, True]
    assert len(edges._edges) == 2 and edges.replaced == 1


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("fault", "error"), [("die", NoWorkerError), ("die late", NoWorkerError),
                                              ("stall", NoWorkerError), ("lie", NoWorkerError)])  # fmt: skip
def test_if_all_are_gone_it_waits_a_moment_and_says_so(layer: Layer, fault: str, error: Any, rows: int) -> None:
    links = [Fake(layer, fault) for _ in range(3)]
    edges = pool_of_edges(*links)
    know(edges, 1e-3, 1e-3, 1e-3)
    begin = time.monotonic()
    with pytest.raises(error):
        run(edges, layer, inputs(rows))
    assert time.monotonic() - begin >= 0.1 and not any(link.alive for link in links)
    assert sum(link.lies for link in links) == 3 * (fault == "lie")
    with pytest.raises(NoWorkerError, match="no edge is connected"):
        run(edges, layer, inputs(rows))


def test_a_lie_of_the_only_edge_is_told_at_once(layer: Layer) -> None:
    link = Fake(layer, "lie")
    edges = pool_of_edges(link, patience=60)
    begin = time.monotonic()
    with pytest.raises(VerificationError):
        run(edges, layer, inputs(2))
    assert time.monotonic() - begin < 10 and link.lies == 1


def test_one_that_comes_in_time_gets_the_rows_of_one_that_died(layer: Layer) -> None:
    edges = pool_of_edges(Fake(layer, "die late"), patience=10)
    timer = threading.Timer(0.2, edges.add, [Fake(layer), "another"])
    timer.start()
    x = inputs(3)
    assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)
    assert edges.rows["another"] == 3


def test_one_that_fails_each_time_it_comes_back_holds_up_nobody_for_long(layer: Layer) -> None:
    edges = pool_of_edges(Fake(layer))
    for _ in range(30):
        back = Fake(layer, "stall")
        edges.add(back, "flapping")
        run(edges, layer, inputs(1))
        edges.remove(back)
    assert edges.replaced == 1
    edges = Edges(0.1)  # but if it is the only one, it is asked
    for _ in range(3):
        edges.add(Fake(layer, "die", 1), "flapping")
        run(edges, layer, inputs(1))
        with pytest.raises(NoWorkerError):
            run(edges, layer, inputs(1))


def test_a_device_that_stalls_on_all_its_links_holds_up_once(layer: Layer) -> None:
    edges = pool_of_edges(Fake(layer))
    know(edges, 1.0)  # it would be asked last
    for _ in range(8):
        edges.add(Fake(layer, "stall"), "stalling")
    begin = time.monotonic()
    for _ in range(3):
        run(edges, layer, inputs(1))
    assert edges.replaced == 1 and time.monotonic() - begin < 3


def test_one_that_comes_while_the_only_one_stalls_is_asked(layer: Layer) -> None:
    edges = pool_of_edges(Fake(layer, "stall"))
    threading.Timer(0.1, edges.add, [Fake(layer), "another"]).start()
    begin, x = time.monotonic(), inputs(2)
    assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)
    assert time.monotonic() - begin < 1.5 and edges.rows["another"] == 2


def test_a_single_edge_has_the_links_own_patience(layer: Layer) -> None:
    edges = pool_of_edges(Fake(layer, delay=0.6))
    x = inputs(2)
    for _ in range(2):
        assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)


@pytest.mark.parametrize("fault", ["", "die", "lie", "stall"])
def test_sixteen_threads_over_three_edges(layer: Layer, fault: str) -> None:
    links = [Fake(layer, delay=0.004), Fake(layer, fault, 5, delay=0.004), Fake(layer, delay=0.004)]
    edges = pool_of_edges(*links)

    def work(i: int) -> bool:
        for k in range(12):
            x = inputs(1 + (i + k) % 3)
            if not np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4):
                return False
        return True

    begin = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(16)))
    assert time.monotonic() - begin < 0.7 * 16 * 12 * 0.004 + 1.0
    seen = all_seen(*links)
    assert len(set(seen)) == len(seen)
    used = [len(link.seen) for link in links if not link.fault]
    assert min(used) > 0.5 * max(used), used  # they shared the work


def test_an_error_of_ours_is_no_failure_of_an_edge(layer: Layer) -> None:
    links = [Fake(layer) for _ in range(3)]
    edges, x = pool_of_edges(*links), inputs(6)
    know(edges, 1.0, 1.0, 1.0)
    x[4, 2] = np.nan
    with pytest.raises(NumericsError):
        run(edges, layer, x)

    def fails(x: np.ndarray) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        edges.run(exchange, layer.op, inputs(6), layer.pads, fails)
    empty = Pool([layer.op.shape], patience=0.05)
    with pytest.raises(LinkError, match="nobody makes"):
        run(edges, layer, inputs(6), empty)
    assert all(link.alive for link in links) and edges.replaced == 0
    assert np.isfinite(run(edges, layer, inputs(6))).all()  # and no turn was kept


def test_one_link_for_what_is_kept_on_an_edge(layer: Layer) -> None:
    links = [Fake(layer), Fake(layer), Fake(layer)]
    edges = pool_of_edges(*links)
    assert edges.pick("edge1").link is links[1]
    edges.add(links[2], "edge1")
    assert edges.pick("edge1").link is links[2]  # the newest
    links[2].close()
    assert edges.pick("edge1").link is links[1]
    links[1].close()
    with pytest.raises(NoWorkerError, match="this device has no edge"):  # another's would see its hidden states
        edges.pick("edge1")


def test_a_lie_of_a_picked_edge_is_known(layer: Layer) -> None:
    link = Fake(layer, "lie")
    edges = pool_of_edges(link)
    with pytest.raises(VerificationError):
        edges.pick("edge0").run(exchange, layer.op, inputs(1), layer.pads, layer.own)
    assert link.lies == 1 and not link.alive


def test_after_close_nobody_waits(layer: Layer) -> None:
    edges = Edges(60)
    threading.Timer(0.1, edges.close).start()
    begin = time.monotonic()
    with pytest.raises(NoWorkerError):
        run(edges, layer, inputs(1))
    with pytest.raises(NoWorkerError):
        edges.wait()
    assert time.monotonic() - begin < 5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FAULTS[:4]), st.integers(0, 4)), min_size=1, max_size=4),
       st.lists(st.integers(1, 9), min_size=1, max_size=6))  # fmt: skip
def test_right_or_refused_whatever_happens(plans: list[tuple[str, int]], asked: list[int]) -> None:
    layer = LAYER
    links = [Fake(layer, fault, at) for fault, at in plans]
    edges = pool_of_edges(*links, patience=0.01)
    for rows in asked:
        x = inputs(rows)
        try:
            assert np.allclose(run(edges, layer, x), layer.wanted(x), rtol=0, atol=2e-4)
        except (NoWorkerError, VerificationError):
            assert not any(link.alive for link in links)
    seen = all_seen(*links)
    assert len(set(seen)) == len(seen)


LAYER = Layer()


def test_a_runtime_without_edges_does_not_go_elsewhere(layer: Layer) -> None:
    """A pool that is empty is still the one to ask, whatever else there is."""
    runtime, edges = Runtime([layer.op], bytes(32)), pool_of_edges()
    runtime.pool.own, runtime.default_link = layer.pads.own, Fake(layer)
    with runtime.using(edges), pytest.raises(NoWorkerError):
        runtime.product(layer.op, inputs(1), layer.own)
    edges.add(link := Fake(layer), "one")
    with runtime.using(edges):
        assert np.allclose(runtime.product(layer.op, inputs(2), layer.own), layer.wanted(inputs(2)), rtol=0, atol=2e-4)
    assert len(link.seen) == 1
