"""`slip` commands as processes that can be killed, and a model for them to run."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from sliplm.edge.client import stream
from sliplm.protocol.messages import Chunk
from sliplm.registry import authority

START_SECONDS = 300.0

# A command is started as usual, or forked from a server that has imported the libraries and done nothing else: two
# hundred restarts would otherwise spend half an hour importing. Where memory is measured it is started as usual, since
# a fork shares its parent's pages at first, and ceases to bit by bit.
_fresh = multiprocessing.get_context("spawn")
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(
    [
        "bench.soak.processes",
        "sliplm.cli",
        "sliplm.engine.builtin",
        "sliplm.edge.serve",
        "transformers.models.llama.modeling_llama",
    ]
)


class Command:
    """`slip ARGUMENTS --json`, running; or any other function that prints a line of JSON once it is ready.

    Attributes:
        log: the file that its standard error goes to.
    """

    def __init__(
        self,
        scratch: Path,
        *arguments: str | Path | int,
        before: Callable[[], object] | None = None,
        main: Callable[[], object] | None = None,
        fresh: bool = False,
    ) -> None:
        """Start it, forked or `fresh`. `before` runs first, in the new process; `main` runs there in place of the
        command line."""
        handle, name = tempfile.mkstemp(prefix=f"{arguments[0]}-", suffix=".out", dir=scratch)
        os.close(handle)
        self._out = Path(name)
        self.log = self._out.with_suffix(".log")
        line = ["slip", *map(str, arguments), "--json"]
        start = _fresh.Process if fresh else _forked.Process
        self._process = start(target=_run, args=(line, self._out, self.log, before, main), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ready(self, timeout: float = START_SECONDS) -> dict[str, Any]:
        """What it printed when it was up. Raises RuntimeError if it ends, or takes too long."""
        deadline = time.monotonic() + timeout
        while not (line := self._out.read_text()).endswith("\n"):
            if not self.alive or time.monotonic() > deadline:
                raise RuntimeError(f"{self._out.stem} did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)
        return json.loads(line.splitlines()[0])

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.join()

    def stop(self, timeout: float = 30.0) -> int | None:
        """Ask it to end; its exit status, or None if it had to be killed."""
        self._process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> int | None:
        """Its exit status, or None if it had to be killed after `timeout` seconds."""
        self._process.join(timeout)
        if self.alive:
            self.kill()
            return None
        return self._process.exitcode

    def usage(self) -> dict[str, int]:
        """What it holds of the machine: private memory (bytes; shared maps of the bundle do not count), threads,
        file descriptors."""
        process = psutil.Process(self.pid)
        with process.oneshot():
            return {
                "memory": process.memory_full_info().uss,
                "threads": process.num_threads(),
                "descriptors": process.num_fds(),
            }

    def cpu_seconds(self) -> float:
        """Processor time that it has used, of all its threads."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def complaints(self) -> str:
        """Tracebacks and internal errors in its log: there should be none."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(x for x in lines if "Traceback" in x or "internal error" in x or "Fatal" in x)


def _run(line: list[str], out: Path, log: Path, before: Callable | None, main: Callable | None) -> None:
    # The commands must not outlive the experiment, however that ends (1 is PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number, path in ((1, out), (2, log)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    if before:
        before()
    if main:
        main()
        return
    from sliplm.cli import main as slip

    sys.argv = line
    slip()


class Site:
    """A split model with an authority of its own, and the commands that run it.

    Args:
        bundle: DIR, as `slip split` wrote it. Its files are linked to, not copied.
        scratch: an empty directory for everything else.
    """

    def __init__(self, bundle: Path, scratch: Path) -> None:
        self.scratch = scratch
        self.bundle = scratch / bundle.name
        for side in ("edge", "trusted"):
            (self.bundle / side).mkdir(parents=True)
            for file in (bundle / side).iterdir():
                if file.is_file() and not file.name.startswith("."):
                    _link(file, self.bundle / side / file.name)
        self.commands: list[Command] = []
        self.registry = authority.open_registry(self.bundle / "trusted" / "authority")

    def enrol(self, name: str, **roles: bool) -> Path:
        """A new device's identity file."""
        path = self.scratch / f"{name}.identity"
        authority.add_device(self.bundle / "trusted" / "authority", name, path, **roles)
        return path

    def start(self, *arguments: str | Path | int, **options: Any) -> Command:
        command = Command(self.scratch, *arguments, **options)
        self.commands.append(command)
        return command

    def trusted(self, port: int = 0, *more: str, **options: Any) -> tuple[Command, str]:
        """A trusted side that listens, and its address."""
        command = self.start("trusted", self.bundle / "trusted", "--listen", f"127.0.0.1:{port}", *more, **options)
        return command, command.ready()["listening"]

    def edge(self, address: str, identity: Path, **options: Any) -> Command:
        """An edge with an API; it is connected once it is `ready`."""
        where = ("--trusted", address, "--identity", identity, "--api", "127.0.0.1:0")
        return self.start("edge", self.bundle / "edge", *where, **options)

    def helper(self, address: str, identity: Path, **options: Any) -> Command:
        """A helper; it is connected once it is `ready`."""
        where = ("--trusted", address, "--identity", identity)
        return self.start("helper", self.bundle / "edge", *where, **options)

    def close(self) -> None:
        for command in self.commands:
            command.kill()
        self.registry.close()


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def site(bundle: Path) -> Iterator[Site]:
    """A `Site` in a temporary directory; its processes end with the block."""
    with tempfile.TemporaryDirectory(prefix="slip-soak-", ignore_cleanup_errors=True) as scratch:
        here = Site(bundle, Path(scratch))
        try:
            yield here
        finally:
            here.close()


def ask(api: str, prompt: str, max_tokens: int, timeout: float = 300.0) -> Iterator[Chunk]:
    """Stream the greedy continuation of `prompt` from the edge's API at `api`."""
    return stream(api, prompt, {"max_tokens": max_tokens, "temperature": 0}, raw=True, timeout=timeout)


def text(api: str, prompt: str, max_tokens: int) -> str:
    """The whole of it."""
    return "".join(chunk.text for chunk in ask(api, prompt, max_tokens))


def eventually(what: Callable[[], Any], seconds: float, every: float = 0.05) -> Any:
    """`what()`, as soon as it does not raise; its last exception after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return what()
        except Exception:
            if time.monotonic() > deadline:
                raise
        time.sleep(every)
