"""Grammars are tried in a process of their own first: compiling one can take hours and all memory, and devices choose
them. What takes too much kills that process, and the next grammar gets another one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

from sliplm.errors import BusyError, SlipError

START_SECONDS = 60.0
TRY_SECONDS = 20.0
"""By the clock; a grammar's CPU seconds are fewer."""

WAIT_SECONDS = 20.0
"""So long a grammar waits for those before it."""

REMEMBERED = 1024
"""Grammars that passed need not pass again."""


class Trials:
    """Tries grammars, one at a time, in a process that starts with the first one. It ends with this process, or when it
    is closed."""

    def __init__(self, tokenizer: str, ends: list[int]) -> None:
        """`tokenizer` is its JSON, `ends` its end tokens."""
        self._first = [tokenizer, ends]
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._passed: dict[bytes, None] = {}

    def check(self, grammar: str) -> None:
        """Return if this process can compile `grammar`. Raises ValueError as `grammar.compiled` does, BusyError if too
        many wait, SlipError if there is no process to try it in."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest in self._passed:
            return
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise BusyError("the trusted side is busy with other schemas: try again later", 10)
        try:
            if self._child is None or self._child.poll() is not None:
                self._child = _start()
                if self._ask(self._child, self._first, START_SECONDS) is not None:
                    raise SlipError("the process that tries schemas did not start")
            if (fault := self._ask(self._child, grammar, TRY_SECONDS)) is not None:
                raise ValueError(fault)
            self._passed[digest] = None
            if len(self._passed) > REMEMBERED:
                del self._passed[next(iter(self._passed))]
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process, whatever it does."""
        if (child := self._child) is not None:
            child.kill()
            child.wait()

    def _ask(self, child: subprocess.Popen[str], question: Any, seconds: float) -> str | None:
        """What `child` answers; nothing, as for a grammar that is too complex, if it ends instead."""
        assert child.stdin is not None and child.stdout is not None
        watchdog = threading.Timer(seconds, child.kill)
        watchdog.daemon = True
        watchdog.start()
        answer = ""
        with contextlib.suppress(OSError):
            print(json.dumps(question), file=child.stdin, flush=True)
            answer = child.stdout.readline()
        watchdog.cancel()
        if answer:
            fault: str | None = json.loads(answer)
            return fault
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return ""


def _start() -> subprocess.Popen[str]:
    """The process knows what comes by its stdin: others see command lines, and an environment may hold passwords."""
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "sliplm.engine.grammar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it might quote a schema
            cwd="/",
            env={"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path), **libraries},  # noqa: PTH100
            text=True,
            start_new_session=True,  # interrupts are for the trusted side, which lets requests finish
        )
    except OSError:
        raise SlipError("the process that tries schemas cannot be started") from None
