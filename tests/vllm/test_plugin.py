"""What the plugin sets and refuses before vLLM loads anything, and the layers by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.quantization import get_quantization_config

from sliplm.engine.vllm import plugin
from sliplm.engine.vllm.layers import Layers, _stacked
from sliplm.engine.vllm.method import SlipConfig
from sliplm.errors import BundleError, SlipError, UnsupportedModelError
from sliplm.split.plan import GroupPlan


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLIP_LISTEN", "SLIP_PADS", "SLIP_STOCK", "SLIP_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_CPU_OMP_THREADS_BIND", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "undone afterwards")
        monkeypatch.delenv(name)


def arguments(split: Path, **options: Any) -> EngineArgs:
    return EngineArgs(model=str(split / "trusted"), **options)


def test_vllm_knows_the_method_and_runs_eagerly_in_float32(split: Path) -> None:
    given = arguments(split)
    plugin.prepare(given)
    assert (given.dtype, given.enforce_eager) == ("float32", True)
    assert get_quantization_config("slip") is SlipConfig
    chosen = arguments(split, dtype="bfloat16")
    plugin.prepare(chosen)
    assert chosen.dtype == "bfloat16"


def test_registering_twice_changes_nothing() -> None:
    plugin.register()
    before = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size has to be 1"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size has to be 1"),
        ({"data_parallel_size": 2}, "--data-parallel-size has to be 1"),
        ({"enable_lora": True}, "merge the adapter"),
        ({"speculative_config": {"method": "eagle", "model": "x"}}, "n-grams alone"),
        ({"load_format": "dummy"}, "--load-format auto"),
    ],
)
def test_what_cannot_be_is_refused(split: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SlipError, match=sentence):
        arguments(split, **options).create_engine_config()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SLIP_STOCK", "many", "SLIP_STOCK is a number of tokens"),
        ("SLIP_LISTEN", "nowhere", "is not an address"),
        ("SLIP_PADS", "elves", "does not say who makes one-time pads"),
        ("SLIP_PADS", "self:/nowhere", "is no edge bundle"),
    ],
)
def test_a_wrong_environment_is_refused(
    split: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SlipError, match=sentence):
        arguments(split).create_engine_config()


def test_without_an_edge_bundle_helpers_have_to_be_named(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(split / "trusted", tmp_path / "trusted")
    with pytest.raises(BundleError, match="nobody makes one-time pads"):
        arguments(tmp_path).create_engine_config()
    monkeypatch.setenv("SLIP_PADS", "helpers:2")
    plugin.prepare(arguments(tmp_path))


def test_other_models_are_left_alone(model: Path, split: Path) -> None:
    assert (
        plugin.is_bundle(split / "trusted") and not plugin.is_bundle(model) and not plugin.is_bundle(Path("a/hub-id"))
    )


@pytest.mark.parametrize("place", ["open", "trusted"])
def test_a_plan_with_other_places_than_masked_is_refused(split: Path, place: str) -> None:
    settings = json.loads((split / "trusted" / "config.json").read_text())["quantization_config"]
    settings["plan"][-1]["place"] = place
    with pytest.raises(UnsupportedModelError, match="`slip trusted` runs this one"):
        SlipConfig.from_config(settings)


def test_a_damaged_bundle_is_not_loaded(split: Path, tmp_path: Path) -> None:
    trusted = Path(shutil.copytree(split / "trusted", tmp_path / "trusted"))
    file = trusted / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        Layers(trusted, _plan(split))


def test_layers_that_vllm_puts_together_otherwise_are_refused(split: Path) -> None:
    layers = Layers(split / "trusted", _plan(split))
    layers.claim(["model.layers.0.self_attn.o_proj"])
    with pytest.raises(UnsupportedModelError, match="together with other layers"):
        layers.claim(["model.layers.0.self_attn.q_proj"])


def test_a_trial_run_of_vllms_goes_to_no_edge_and_a_real_step_always_does(split: Path) -> None:
    layers = Layers(split / "trusted", _plan(split))
    part, head = (layers.claim([name]) for name in ("model.layers.0.self_attn.o_proj", "lm_head"))
    part.expect([192], 192)
    head.expect([257], 192)
    asked: list[int] = []

    class Counting:
        def run(self, compute: Any) -> Any:
            asked.append(1)
            return np.ones((3, 1), np.float32)

    layers.edges, part.groups, head.groups = Counting(), [None], [None]  # type: ignore[list-item]
    x = torch.randn(3, 192)
    with override_forward_context(SimpleNamespace(attn_metadata=None)):
        assert part(x).shape == (3, 192) and not part(x).any()
    assert head(x).shape == (3, 257) and not head(x).any() and not asked  # as part of the same run
    with override_forward_context(SimpleNamespace(attn_metadata={})):
        assert part(x).all()
    assert head(x).all() and len(asked) == 2
    with override_forward_context(SimpleNamespace(attn_metadata=None)), pytest.raises(SlipError, match="attention"):
        part(x)


def _plan(split: Path) -> list[GroupPlan]:
    settings = json.loads((split / "trusted" / "config.json").read_text())["quantization_config"]
    return SlipConfig.from_config(settings).plan


def test_a_row_that_is_not_finite_is_its_own_affair(split: Path, truth: Callable[..., str]) -> None:
    from sliplm.engine.builtin import BuiltinEngine

    engine = BuiltinEngine(split / "trusted")
    engine.model.slip.attach(split / "edge")
    group = engine.model.model.layers[0].self_attn.o_proj._group
    x = torch.randn(3, 192).numpy()
    expected = group.stacked(x)
    x[1, 5] = np.inf
    y = _stacked(group, x)
    assert np.isnan(y[1]).all() and np.allclose(y[[0, 2]], expected[[0, 2]], atol=1e-4)
