"""OpenAI's own client in front of a trusted side and an edge that run as processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
from processes import Process

from sliplm.registry import authority

MODEL = "org/my model"
HELLO = [{"role": "user", "content": "Hello"}]


class Pair:
    """A trusted side and an edge with a key, as processes."""

    def __init__(self, directory: Path, split: Path, *options: str) -> None:
        bundle = Path(shutil.copytree(split, directory / "bundle"))
        shutil.rmtree(bundle / "trusted" / "authority", ignore_errors=True)
        identity, key = directory / "one.identity", directory / "key"
        authority.add_device(bundle / "trusted" / "authority", "one", identity)
        key.write_text("sk-local-key\n")
        self.trusted = Process("trusted", bundle / "trusted", "--listen", "127.0.0.1:0", "--name", MODEL, *options)
        address = self.trusted.ready()["listening"]
        self.edge = Process(
            "edge", bundle / "edge", "--trusted", address, "--identity", identity, "--api", "127.0.0.1:0",
            "--api-key", key, "--log-format", "json",
        )  # fmt: skip
        self.api = self.edge.ready()["api"]
        self.client = openai.OpenAI(
            base_url=f"{self.api}/v1", api_key="sk-local-key", max_retries=0, timeout=60,
            http_client=httpx.Client(trust_env=False),
        )  # fmt: skip

    def close(self) -> None:
        self.client.close()
        for process in (self.edge, self.trusted):
            process.process.kill()
            process.process.wait()
            process.process.stdout.close()


def chat(client: openai.OpenAI, **what: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 12, **what})
