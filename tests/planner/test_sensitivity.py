"""What blocks are worth: perplexities of a model with parts taken away, each for itself, and nothing left changed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from torch import nn

from sliplm.errors import SlipError
from sliplm.planner import heatmap
from sliplm.planner.ablation import Subject
from sliplm.planner.sensitivity import Worth, measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("worth") / "model", num_hidden_layers=3))


@pytest.fixture(scope="module")
def worth(model: str) -> Worth:
    return measure(model, [2, 8], tokens=512)


def plain(model: Any, windows: torch.Tensor) -> float:
    """Perplexity, computed anew."""
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])
            for ids in windows
        ]
    return math.exp(float(torch.stack(losses).mean()))


def test_every_figure_is_that_of_a_changed_copy(model: str, worth: Worth) -> None:
    subject = Subject(model, None, 512)
    assert worth.original == pytest.approx(plain(subject.model, subject.windows), rel=1e-4)
    assert worth.tokens == 512 and worth.ranks == [2, 8] and len(worth.blocks) == 3
    for number, block in enumerate(worth.blocks):
        changed = copy.deepcopy(subject.model)
        del changed.model.layers[number]
        assert block.skipped == pytest.approx(plain(changed, subject.windows), rel=1e-4)
        for rank in (2, 8):
            changed = copy.deepcopy(subject.model)
            layer = changed.model.layers[number]
            u, s, vt = torch.linalg.svd(layer.mlp.down_proj.weight.data, full_matrices=False)
            layer.mlp.down_proj.weight.data = (u[:, rank:] * s[rank:]) @ vt[rank:]
            assert block.layers["mlp.down_proj"][rank] == pytest.approx(plain(changed, subject.windows), rel=1e-3)
        assert len(block.layers) == 7 and set(block.all) == {2, 8}


def test_nothing_is_left_changed(model: str) -> None:
    subject = Subject(model, None, 512)
    before = {name: p.clone() for name, p in subject.model.state_dict().items()}
    original = subject.perplexity()
    found = subject.layers[1]["self_attn.q_proj"]
    with subject.from_block(1):
        assert subject.perplexity() == pytest.approx(original, rel=1e-6)  # what is remembered is what was computed
        with subject.skipped(1), subject.random(1), subject.without(found, subject.factors(found, 4), 4):
            assert subject.perplexity() != pytest.approx(original, rel=1e-3)
    assert subject.perplexity() == original
    assert all(torch.equal(p, before[name]) for name, p in subject.model.state_dict().items())
    assert not any("forward" in block.__dict__ for block in subject.blocks)


def test_the_report_stands_alone(worth: Worth, tmp_path: Path) -> None:
    heatmap.write(worth, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert page.count("<rect") == 3 * len(heatmap.columns(worth)) == 3 * (2 + 2 + 14)
    assert "http" not in page and "<script" not in page and "src=" not in page
    assert heatmap._colour(0) == "#ffffff" and heatmap._colour(1) == "#e15050"


def test_names_are_escaped(worth: Worth, tmp_path: Path) -> None:
    heatmap.write(Worth("<b>&", worth.tokens, worth.ranks, worth.original, worth.blocks), tmp_path / "out.html")
    assert "<b>&" not in (tmp_path / "out.html").read_text()


def test_what_cannot_be_measured(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(SlipError, match="is not a model"):
        measure(str(tmp_path / "nothing"))
    with pytest.raises(SlipError, match="cannot read"):
        measure(str(tiny), text_file=tmp_path / "nothing")
    (tmp_path / "short").write_text("a")
    with pytest.raises(SlipError, match="too short"):
        measure(str(tiny), text_file=tmp_path / "short")
