"""The commands of `slip` as child processes: what the demonstration and the benchmarks run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sliplm.errors import LinkError

START_SECONDS = 120


@contextmanager
def process(command: str, *arguments: str | Path) -> Iterator[dict[str, Any]]:
    """Run `slip COMMAND ... --json` until the block ends; gives what it prints once it is ready, and its `pid`.

    Raises LinkError, with what it wrote to stderr, if it does not become ready.
    """
    line = [sys.executable, "-m", "sliplm.cli", command, *map(str, arguments), "--json"]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    log: deque[str] = deque(maxlen=20)
    reader = threading.Thread(target=lambda: log.extend(child.stderr or []), daemon=True)
    reader.start()
    watchdog = threading.Timer(START_SECONDS, child.kill)
    watchdog.start()
    try:
        ready = child.stdout.readline()
        watchdog.cancel()
        if not ready:
            child.wait()
            reader.join(1)
            raise LinkError(f"`slip {command}` did not start: {''.join(log).strip() or 'no message'}")
        yield {"pid": child.pid, **json.loads(ready)}
    finally:
        watchdog.cancel()
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of another process so far; nan where the system does not tell as Linux does."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, float]:
    """What a process holds now, how much of that is no file's, and the most that it ever held, bytes; nan where the
    system does not tell as Linux does."""
    fields = {"now": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return dict.fromkeys(fields, float("nan"))
    return {name: 1024 * float(status.partition(f"{field}:")[2].split()[0]) for name, field in fields.items()}
