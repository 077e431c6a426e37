"""What plans cost: by hand for a small model, and beside a real split of one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from loading import attached
from safetensors import safe_open

import sliplm.trusted  # noqa: F401 - teaches Transformers to load trusted bundles
from sliplm.bundle import EdgeBundle
from sliplm.errors import SlipError
from sliplm.exchange.step import PARTS
from sliplm.planner import costs, shapes
from sliplm.planner.costs import Cost, Network, Pass, Split, cost, masked
from sliplm.planner.predict import Prediction, Work, predict
from sliplm.planner.shapes import Block, Group, Model
from sliplm.planner.speeds import USUAL, Edge, Plain, Speeds, Trusted
from sliplm.protocol.frames import HEADER
from sliplm.protocol.remote import AHEAD
from sliplm.split.camouflage import trusted_rank
from sliplm.split.places import places

QKV, DOWN, HEAD = Group(((8, 6), (4, 6))), Group(((6, 12),)), Group(((20, 6),))
SMALL = Model("small", (Block((QKV, DOWN), 8, 8),) * 3, (HEAD,), 6, 120, False, 2)
ONES = Speeds(
    Trusted(step=1, exchange=1, encode=1, decode=1, tls=1, read=1, multiply_adds=1, plain=Plain(1, 1, 1, 1, 1)),
    Edge(tls=1, read=1, multiply_adds=1, plain=Plain(1, 1, 1, 1, 1)),
)


def one(plan: str, network: Network | None = None, work: Work | None = None) -> Prediction:
    return predict(SMALL, [plan], work or Work(prompt=1), Split(1, 2), ONES, network or Network())[0]


def test_a_group_by_hand() -> None:
    found = masked(QKV, 1, Split(1, 2), ONES, Network(round_trip=1000, bandwidth=0.5))
    low_rank = trusted_rank(1, 8, 6, True) * 14 + trusted_rank(1, 4, 6, True) * 10
    sent, received, product = 4 * 6, 4 * 24, 24 * 6
    edge = product + sent + received
    ahead, after = 1 + 6 + sent, received + 24
    assert found.seconds == ahead + 1000 + 2 * (sent + received) + edge + after  # the low-rank part is done by then
    assert found.trusted == ahead + 2 * low_rank + after and found.edge == edge
    assert found.round_trips == 1
    assert (found.sent, found.received) == (sent + HEADER.size, received + HEADER.size)


def test_a_long_input_travels_in_parts_of_which_several_are_under_way() -> None:
    network = Network(round_trip=1e9)
    part = masked(QKV, 128, Split(1, 2), ONES, network)
    whole = masked(QKV, 128 * (PARTS + 2), Split(1, 2), ONES, network)
    assert whole.round_trips == PARTS + 2 and whole.edge == pytest.approx((PARTS + 2) * part.edge)
    assert whole.seconds == pytest.approx(2 * part.seconds + PARTS * part.seconds / AHEAD, rel=1e-3)


def test_experts_cost_what_is_to_be_expected() -> None:
    half = Group(QKV.members, used=0.5)
    once, often = (masked(half, rows, Split(1, 2), ONES, Network()) for rows in (1, 64))
    assert once.round_trips == 0.5 and often.round_trips == pytest.approx(1)
    assert once.sent == 0.5 * masked(QKV, 1, Split(1, 2), ONES, Network()).sent
    assert often.sent == pytest.approx(masked(QKV, 32, Split(1, 2), ONES, Network()).sent, rel=1e-9)


@pytest.mark.parametrize(
    ("plan", "trips"),
    [("all", 7), ("first:1", 3), ("first:2", 5), ("last:1", 3), ("blocks:1", 4), ("blocks:0,2", 5), ("trusted:2", 1)],
)
def test_round_trips_of_plans(plan: str, trips: int) -> None:
    assert one(plan).round_trips == trips
    slow, fast = (one(plan, Network(round_trip=rtt)).seconds for rtt in (1e6, 0))
    assert slow - fast == pytest.approx(trips * 1e6, rel=1e-2)


def test_memory_and_arithmetic_by_hand() -> None:
    block = 12 * 6 + 6 * 12
    found = one("trusted:1", work=Work(prompt=3))
    assert found.trusted_multiply_adds == block + 120 and found.trusted_share == (block + 120) / (3 * block + 120)
    assert found.edge_bytes == 4 * (2 * block + 2 * 8 * 4) and found.trusted_bytes == 4 * (block + 120 + 8 * 4) + 240
    assert (found.pad_bytes, found.stock_bytes, found.helpers, found.checks) == (0, 0, 0, 0)
    whole = one("all", work=Work(prompt=3))
    assert whole.edge_bytes == 2 * (3 * block + 120) and whole.pad_bytes == 4 * 2 * (3 * 18 + 20)
    assert whole.checks == 2 * (3 * (24 + 6 + 12 + 12) + 40 + 6)


def test_a_narrow_wire_and_more_streams() -> None:
    wide, narrow = one("all"), one("all", Network(bandwidth=1e-3))
    assert narrow.seconds - wide.seconds == pytest.approx(
        1e3 * (wide.sent + wide.received - 14 * HEADER.size), rel=1e-3
    )
    assert one("all", work=Work(streams=4, prompt=1)).decode > wide.decode
    assert one("first:1", work=Work(streams=4, prompt=1)).decode >= one("first:1").decode


def test_whole_blocks_by_hand() -> None:
    """Transformers makes the pass, on both sides; a block takes other time beside its weights for many rows."""
    plain = Plain(step=1e3, block=1e5, many=1e6, read=1, multiply_adds=1)
    speeds = Speeds(msgspec.structs.replace(ONES.trusted, plain=plain), msgspec.structs.replace(ONES.edge, plain=plain))
    block, head, row = 12 * 6 + 6 * 12, 120, 4 * 6
    for rows, beside in ((1, 1e5), (2, 1e6)):
        found = cost(SMALL, places("trusted:1", 3), Pass(rows=rows), Split(1, 2), speeds, Network())
        weights = max(4, rows) * (3 * block) + 4 * head
        attention = 3 * max(4 * 8 * rows, 2 * 8 * rows / 2 * rows)
        wire = 2 * 2 * row * rows + 1  # TLS on both sides, and the exchange
        assert found.seconds == 2 * 1e3 + 3 * beside + weights + attention + wire
    masked_all = [cost(SMALL, places("all", 3), Pass(), Split(1, 2), known, Network()) for known in (speeds, ONES)]
    assert masked_all[0] == masked_all[1]  # where nothing is whole, that plays no part


def test_a_plan_that_names_blocks_that_are_not_there() -> None:
    with pytest.raises(SlipError, match="4 blocks, and this model has 3"):
        one("first:4")


def test_costs_add_up() -> None:
    a = Cost(1, 2, 3, 4, 5, 6)
    assert a + a == a * 2 and (a + Cost()) == a


@pytest.mark.slow
def test_a_real_split_has_the_same_figures(tiny: Path, tiny_split: Path) -> None:
    """Round trips and bytes as a runtime counts them; the edge's bytes, the trusted side's and its multiply-adds as
    the bundle has them."""
    shape = shapes.read(str(tiny))
    (found,) = predict(shape, ["all"], Work(prompt=1), Split(4, 2), USUAL, Network())
    edge = EdgeBundle.open(tiny_split / "edge")
    assert found.edge_bytes == sum(rows * columns for rows, columns in edge.shapes)
    with safe_open(tiny_split / "trusted" / "model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dictionary
        secret = [name for name in sizes if not name.endswith((".weight", ".bias"))]
        held = sum(file.get_tensor(name).nbytes for name in secret)
        table = next(math.prod(shape) for name, shape in sizes.items() if "embed_tokens" in name)
    caches = 4 * 2 * sum(block.cache for block in shape.blocks)
    assert found.trusted_bytes == held + shape.stored * table + caches
    factors = [math.prod(shape) for name, shape in sizes.items() if name.endswith((".factor_a", ".factor_b"))]
    assert found.trusted_multiply_adds == sum(factors)
    model: Any = attached(transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted"))
    with torch.inference_mode():
        out = model(input_ids=torch.arange(5)[None], use_cache=True)
        before = asdict_of(model)
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
    counted = {name: value - before[name] for name, value in asdict_of(model).items()}
    assert found.round_trips == counted["exchanges"]
    assert found.sent == counted["sent"] + counted["exchanges"] * HEADER.size
    assert found.received == counted["received"] + counted["exchanges"] * HEADER.size
    prompt = cost(shape, places("all", 2), Pass(rows=300), Split(4, 2), USUAL, Network())
    before = asdict_of(model)
    with torch.inference_mode():
        model(input_ids=torch.arange(300)[None] % 256, logits_to_keep=1)
    assert prompt.round_trips == asdict_of(model)["exchanges"] - before["exchanges"]


def asdict_of(model: Any) -> dict[str, int]:
    return asdict(model.slip.counters)


def test_what_is_in_no_block_is_masked_only_if_all_blocks_are() -> None:
    assert costs.outside(["masked"] * 3) == "masked"
    assert costs.outside(["masked", "open"]) == costs.outside(["trusted", "open"]) == "trusted"


def test_speeds_are_read_and_refused(tmp_path: Path) -> None:
    import msgspec

    from sliplm.planner import speeds

    path = tmp_path / "speeds.json"
    path.write_bytes(msgspec.json.encode(USUAL))
    assert speeds.read(path) == USUAL
    wrong = json.loads(path.read_text())
    wrong["edge"]["plain"]["read"] = 0
    path.write_text(json.dumps(wrong))
    with pytest.raises(SlipError, match=r"edge.plain.read is 0"):
        speeds.read(path)
    for text in ("{}", "nonsense", '{"trusted": 3}'):
        path.write_text(text)
        with pytest.raises(SlipError, match="no speeds"):
            speeds.read(path)
    with pytest.raises(SlipError, match="cannot read"):
        speeds.read(tmp_path / "nothing")
