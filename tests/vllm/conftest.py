"""`vllm serve` on a tiny model's bundle, with real edges, in an environment of its own (`make test-vllm`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import WAIT, Process, start_edge
from tiny import save_tiny

from sliplm.engine.builtin import BuiltinEngine
from sliplm.protocol.messages import GenerateRequest
from sliplm.registry import authority
from sliplm.split.model import Options, split_model

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

SIZES = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 300, "max_position_embeddings": 512}
"""vLLM's attention on a CPU takes heads of 32 and more."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Serve:
    """`vllm serve DIR/trusted` in the background."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        self.directory, self.identities = directory, directory.parent
        self.port, self.address = free_port(), f"127.0.0.1:{free_port()}"
        self.lines: list[str] = []
        command = [Path(sys.executable).with_name("vllm"), "serve", directory / "trusted"]
        named = {
            "port": self.port,
            "host": "127.0.0.1",
            "kv-cache-memory-bytes": 100_000_000,
            "served-model-name": "tiny",
        }
        said = {"SLIP_LISTEN": self.address, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*map(str, command), *(f"--{name}={value}" for name, value in named.items()), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **said, **environment},
        )
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> Serve:
        deadline = time.monotonic() + 2 * WAIT
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log
                time.sleep(0.2)

    def fails(self) -> str:
        assert self.process.wait(WAIT) != 0
        self._reader.join(5)
        return self.log

    def stop(self) -> None:
        """At once, with all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT)

    def enrol(self, name: str) -> Path:
        authority.add_device(self.directory / "trusted" / "authority", name, self.identities / f"{name}.identity")
        return self.identities / f"{name}.identity"

    def edge(self, run: Any, name: str) -> Process:
        """A connected edge of a new device."""
        edge: Process = start_edge(run, self.directory, self.address, self.enrol(name))
        edge.ready()
        return edge

    def client(self, seconds: float = WAIT) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", timeout=seconds, max_retries=0)

    def complete(self, prompt: str, max_tokens: int = 16, **options: Any) -> str:
        client = self.client()
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0, **options)
        return answer.choices[0].text


@pytest.fixture(scope="session")
def model(once: Callable[[str, Any], Path]) -> Path:
    return once("vllm-model", lambda out: save_tiny(out, **SIZES))


@pytest.fixture(scope="session")
def split(model: Path, once: Callable[[str, Any], Path]) -> Path:
    """To read."""
    return once("vllm-split", lambda out: split_model(str(model), out, Options(rank=4)))


@pytest.fixture(scope="session")
def truth(split: Path) -> Callable[..., str]:
    """What the built-in engine answers, greedy."""
    engine = BuiltinEngine(split / "trusted")
    engine.model.slip.attach(split / "edge")
    link = engine.model.slip.default_link

    def answer(prompt: str, max_tokens: int = 16) -> str:
        request = GenerateRequest(prompt=prompt, max_tokens=max_tokens, temperature=0)
        return "".join(chunk.text for chunk in engine.generate(request, link))

    return answer


@pytest.fixture(scope="session")
def started(split: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serve]]:
    """Starts `vllm serve` on a copy of the split, to be shared by tests."""
    running: list[Serve] = []

    def start(*options: str, **environment: str) -> Serve:
        directory = Path(shutil.copytree(split, tmp_path_factory.mktemp("serve") / "bundle"))
        authority.add_device(directory / "trusted" / "authority", "first", directory.parent / "first.identity")
        running.append(Serve(directory, *options, **environment))
        return running[-1]

    yield start
    for serve in running:
        serve.stop()
