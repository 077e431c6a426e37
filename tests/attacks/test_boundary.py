"""The attack on a border in the clear: what it sees, what it learns, and that the model is left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny import save_tiny

from sliplm.attacks import boundary
from sliplm.attacks.training import LENGTH, Data, perplexity
from sliplm.attacks.verdict import verdict
from sliplm.split.source import load_whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_whole(str(save_tiny(tmp_path_factory.mktemp("border") / "model", num_hidden_layers=3)))


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    train, valid, held = (torch.randint(0, 256, (n, LENGTH), generator=generator) for n in (6, 1, 2))
    return Data(train, valid, held, torch.arange(257))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "STEPS", 30)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (["masked"] * 3, []),
        (["trusted", "trusted", "open"], [(0, 2)]),
        (["masked", "open", "masked"], [(0, 1), (2, 3)]),
        (["open", "masked", "trusted"], [(1, 3)]),
    ],
)
def test_runs_of_protected_blocks(where: list[Any], found: list[Any]) -> None:
    assert boundary.runs(where) == found


def test_what_the_thief_sees_is_what_crosses(original: Any, data: Data) -> None:
    layers = original.model.layers
    hooks = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    border = boundary.observe(original, layers, (1, 3), data.train)
    assert hooks == [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    ids = data.train[: boundary.WINDOWS]
    with torch.no_grad():
        states = original(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        x, y = border.seen[0]
        assert torch.equal(x, states[1]) and len(border.seen) == 3
        for block, settings in zip(layers[1:], border.settings, strict=True):
            x = boundary._hidden(block(x, **settings))
    assert torch.allclose(x, y, atol=1e-5)


def test_curves_from_every_start(original: Any, data: Data) -> None:
    before = copy.deepcopy(original.state_dict())
    blocks = list(original.model.layers)
    known = perplexity(original, data.held)
    lines = boundary.attack(original, ["masked", "open", "open"], data, 4, base=original)
    assert set(lines) == {"nothing", "edge part", "public base"}
    for line in lines.values():
        assert line["tokens"] == [0, 96, 384, 1536] and len(line["ppl"]) == 4 and line["reached"] == line["ppl"][-1]
        assert all(math.isfinite(ppl) for ppl in line["ppl"])
    assert lines["public base"]["ppl"][0] == pytest.approx(known)  # here the base is the model itself
    assert lines["nothing"]["ppl"][0] != pytest.approx(known, rel=1e-3)
    assert set(boundary.attack(original, ["trusted", "open", "open"], data, 4)) == {"nothing"}
    assert boundary.attack(original, ["masked"] * 3, data, 4) == {}
    assert list(original.model.layers) == blocks
    assert all(torch.equal(p, before[name]) for name, p in original.state_dict().items())


def test_it_learns(original: Any, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "STEPS", 150)
    layers = original.model.layers
    border = boundary.observe(original, layers, (0, 1), data.train)
    students = torch.nn.ModuleList([boundary._fresh(layers[0], original, 0)])

    def error() -> float:
        with torch.no_grad():
            x, y = border.seen[0]
            return float((boundary._hidden(students[0](x, **border.settings[0])) - y).norm() / y.norm())

    begin = error()
    boundary.imitate(students, border, len(border.seen), 3e-3, 0)
    assert error() < 0.7 * begin


def test_it_stands_in_the_verdict() -> None:
    line = {"reached": 20.0, "tokens": [0, 1000], "ppl": [500.0, 20.0]}
    found = verdict({"original": 10.0, "bundles": {"x": {"boundary": {"nothing": line}}}})
    assert found["x"] == [
        "boundary, from nothing: perplexity 20 after 1,000 tokens were seen where hidden states cross in the clear; "
        "500 before any, 10 the original."
    ]
