"""`slip` commands as processes: run to their end, or in the background."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sliplm.edge.client import stream
from sliplm.errors import LinkError

WAIT = 180.0  # machines are busy, and a process imports for seconds of their time


def slip(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sliplm.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "COLUMNS": "200"}
    )


class Process:
    """A `slip` command in the background; `ready` is the JSON it prints when it is up."""

    command = (sys.executable, "-m", "sliplm.cli")

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*self.command, *map(str, arguments), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ready(self) -> dict[str, Any]:
        timer = threading.Timer(WAIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.log
        return json.loads(line)

    def fails(self) -> str:
        assert self.process.wait(WAIT) not in (0, None)
        self._reader.join(5)
        assert "Traceback" not in self.log
        return self.log

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT)


def start_trusted(run: Any, directory: Path, port: int = 0) -> tuple[Process, str]:
    process = run("trusted", directory / "trusted", "--listen", f"127.0.0.1:{port}")
    return process, process.ready()["listening"]


def start_edge(run: Any, directory: Path, address: str, identity: Path, **environment: str) -> Process:
    return run(
        "edge", directory / "edge", "--trusted", address, "--identity", identity, "--api", "127.0.0.1:0", **environment
    )


def ask(api: str, prompt: str, **options: Any) -> str:
    return "".join(c.text for c in stream(api, prompt, {"temperature": 0, **options}, raw=True))


def eventually(what: Any) -> Any:
    deadline = time.monotonic() + WAIT
    while True:
        try:
            return what()
        except (LinkError, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
