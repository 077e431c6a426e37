"""A process of `speed.runner`: started, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sliplm.errors import SlipError
from sliplm.speed.cores import on

START_SECONDS, ANSWER_SECONDS = 600.0, 1200.0

Ask = Callable[..., dict[str, Any]]


@contextmanager
def contender(kind: str, source: str, cores: Collection[int] = (), **options: Any) -> Iterator[Ask]:
    """Run one, on `cores` alone if any are named; gives what sends it a command and returns its answer. Raises
    SlipError, with what it wrote to stderr, if it ends or does not answer."""
    line = [sys.executable, "-m", "sliplm.speed.runner", kind, source, json.dumps(options)]
    environment = dict(os.environ)
    if kind == "protected":
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `slip trusted` does
    pipe = subprocess.PIPE
    with on(cores):  # from its beginning: libraries count cores when they load
        child = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
    log: deque[str] = deque(maxlen=20)
    reader = threading.Thread(target=lambda: log.extend(stderr), daemon=True)
    reader.start()

    def answer(seconds: float) -> dict[str, Any]:
        watchdog = threading.Timer(seconds, child.kill)
        watchdog.start()
        text = stdout.readline()
        watchdog.cancel()
        if not text:
            child.wait()
            reader.join(1)
            raise SlipError(f"the process that measures {kind} ended: {''.join(log).strip() or 'no message'}")
        parsed: dict[str, Any] = json.loads(text)
        return parsed

    def ask(**command: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=stdin, flush=True)
        return answer(ANSWER_SECONDS)

    try:
        answer(START_SECONDS)
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
