"""One server for all clients: the real model, split, behind `slip trusted` and `slip edge` with a key."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
PYTHON = os.environ.get("SLIP_PYTHON", str(HERE.parents[1] / ".venv" / "bin" / "python"))
"""Of the environment that has the package."""

# Some clients would look for news, prices or a place for their records on the internet as they are imported.
os.environ |= {
    "NO_PROXY": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGCHAIN_TRACING_V2": "false",
}


class Server(NamedTuple):
    url: str
    key: str
    model: str


@contextmanager
def slip(log: Path, *arguments: str | Path) -> Iterator[dict[str, Any]]:
    """`slip ...` in the background; gives what it prints when it is ready."""
    with log.open("w") as err:
        command = [PYTHON, "-m", "sliplm.cli", *map(str, arguments), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield json.loads(line)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("clients")
    bundle, key, model = directory / "bundle", "sk-local-key", "HuggingFaceTB/SmolLM2-135M-Instruct"
    subprocess.run([PYTHON, HERE / "prepare.py", bundle], check=True)
    (directory / "key").write_text(key)
    with ExitStack() as running:
        trusted = running.enter_context(
            slip(directory / "trusted.log", "trusted", bundle / "trusted", "--listen", "127.0.0.1:0", "--name", model)
        )
        edge = running.enter_context(
            slip(
                directory / "edge.log", "edge", bundle / "edge", "--trusted", trusted["listening"],
                "--identity", bundle / "identity", "--api", "127.0.0.1:0", "--api-key", directory / "key",
            )
        )  # fmt: skip
        yield Server(f"{edge['api']}/v1", key, model)


CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
"""A question that the model knows the answer to."""


@pytest.fixture
def too_long() -> list[dict[str, str]]:
    """More than the model's 8192 tokens."""
    return [{"role": "user", "content": "word " * 9000}]
