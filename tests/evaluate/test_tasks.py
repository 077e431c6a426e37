"""`slip evaluate --tasks`: lm-eval's part is played by a stand-in with its interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sliplm.cli import app
from sliplm.errors import SlipError, UnsupportedModelError
from sliplm.evaluate.report import evaluate
from sliplm.evaluate.tasks import run_tasks

pytestmark = pytest.mark.slow


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knows one task: the mean logit of one token."""
    package, models, adapter = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model = pretrained

    def simple_evaluate(model: HFLM, tasks: list[str], limit: int | None) -> dict[str, Any]:
        if tasks != ["mean"]:
            raise KeyError(tasks[0])
        value = float(model.model(torch.tensor([[limit or 7]])).logits.detach().mean())
        return {"results": {"mean": {"alias": "mean", "acc,none": value}}}

    adapter.HFLM, package.simple_evaluate = HFLM, simple_evaluate  # type: ignore[attr-defined]
    for module in (package, models, adapter):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_tasks_run_on_both_models(lm_eval: None, tiny: Path, tiny_split: Path) -> None:
    arguments = [
        "evaluate",
        str(tiny_split),
        "--reference",
        str(tiny),
        "--tokens",
        "64",
        "--tasks",
        "mean",
        "--limit",
        "3",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    tasks = json.loads(done.stdout)["tasks"]
    assert tasks["protected"]["mean"]["acc,none"] == pytest.approx(tasks["reference"]["mean"]["acc,none"], abs=1e-3)
    assert "mean acc,none: original" in CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_unknown_tasks_and_a_missing_package(lm_eval: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlipError, match="lm-eval cannot run nonsense"):
        run_tasks(None, None, ["nonsense"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SlipError, match="pip install"):
        run_tasks(None, None, ["mean"])


def test_only_models_that_continue_text_are_evaluated(tmp_path: Path) -> None:
    from zoo import FAMILIES, halves

    halves(FAMILIES["BERT"], tmp_path)
    with pytest.raises(UnsupportedModelError, match="no model that continues text"):
        evaluate(tmp_path / "out", str(tmp_path / "model"))
