"""Benchmarks of lm-evaluation-harness, for the protected model and for the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sliplm.errors import SlipError
from sliplm.extras import require


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of each task: task -> metric -> value.

    Args:
        model: a Transformers model; lm-eval's own adapter for them runs it.
        limit: use only so many examples per task.

    Raises:
        SlipError: lm-eval is not installed, or knows no such task.
    """
    require("lm_eval", "--tasks")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        answer = lm_eval.simple_evaluate(model=adapter, tasks=list(tasks), limit=limit)
    except (KeyError, ValueError) as error:
        raise SlipError(f"lm-eval cannot run {', '.join(tasks)}: {error}.") from None
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in answer["results"].items()
    }
