"""Open blocks on the processor, and on a GPU if there is one: the hidden states that the original has in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny

from sliplm.bundle import EdgeBundle
from sliplm.open import model as open_model
from sliplm.split.model import Options, split_model
from sliplm.split.source import load_whole

ROUNDING = 2e-5  # of the spread of hidden states; TF32, say, would be off by 1e-3
BLOCKS = 3  # that are open, of four: what goes into the first of them is what an embedding gives


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("device") / "model", num_hidden_layers=BLOCKS + 1)


@pytest.fixture(scope="module")
def edge(checkpoint: Path) -> Path:
    split_model(str(checkpoint), checkpoint.parent / "split", Options(rank=4, plan="last:1"), check=False)
    return checkpoint.parent / "split" / "edge"


def whole(model: Any, x: np.ndarray) -> np.ndarray:
    """What the original makes of rows `x` (T, H) up to its last block, in float64."""
    with torch.inference_mode():
        out = model(inputs_embeds=torch.from_numpy(x)[None].double(), output_hidden_states=True, use_cache=False)
    return out.hidden_states[BLOCKS][0].numpy()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_steps_and_cuts_give_the_original_s_hidden_states(
    device: str, edge: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (run,) = open_model.load(EdgeBundle.open(edge))
    original = load_whole(str(checkpoint)).double()
    assert {p.device.type for p in run._decoder.parameters()} == {device}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, run.width)).astype(np.float32)
    cache, done = run.new_cache(), 0

    def step(count: int) -> None:
        nonlocal done
        got = run.compute(x[done : done + count], cache)
        done += count
        want = whole(original, x[:done])[-count:]
        assert np.abs(got - want).max() < ROUNDING * want.std()
        assert run.length(cache) == done and run.size(cache) == done * run.row_bytes

    for count in (9, 1, 1, 5, 1):
        step(count)
    assert run.cut(cache, 11)
    done = 11
    x[done:] = rng.normal(size=(len(x) - done, run.width))  # others than those that were there
    for count in (1, 7, 1):
        step(count)
    assert run.cut(cache, 0)
    done = 0
    step(3)
    alone = run.compute(x, None)
    want = whole(original, x)
    assert np.abs(alone - want).max() < ROUNDING * want.std()
