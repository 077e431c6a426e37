"""lm-evaluation-harness, which asks chat models over HTTP as `local-chat-completions`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Server
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{country}}?"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: named
    filter: [{function: regex, regex_pattern: "(Paris|Rome)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_local_chat_completions(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", server.key)
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "capitals.jsonl"
    rows = [{"country": "France", "capital": "Paris"}, {"country": "Italy", "capital": "Rome"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("DATA", str(data)))
    report = simple_evaluate(
        model="local-chat-completions",
        model_args={"model": server.model, "base_url": f"{server.url}/chat/completions", "max_retries": 1},
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert report["results"]["capitals"]["exact_match,named"] >= 0.5
    assert len(report["samples"]["capitals"]) == 2
