"""An edge runs without torch and whatever else the trusted side needs; commands that cannot say what they lack."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from light import SLIP, light
from processes import Process, ask, start_edge, start_trusted

from sliplm.cli import app
from sliplm.extras import EXTRAS, advice

pytestmark = pytest.mark.slow

NOWHERE = "127.0.0.1:1"
LIGHT = {  # a line that fails, but not for want of a package
    "edge": ["nothing", "--trusted", NOWHERE, "--identity", "nothing"],
    "helper": ["nothing", "--trusted", NOWHERE, "--identity", "nothing"],
    "generate": ["hi", "--api", NOWHERE],
    "chat": ["--api", NOWHERE],
    "top": [NOWHERE, "--once", "--interval", "0.1", "--json"],
    "inspect": ["nothing"],
}
OWNERS = {
    "split": ["model", "-o", "out"],
    "trusted": ["nothing"],
    "evaluate": ["nothing", "--reference", "model"],
    "attack": ["nothing", "--reference", "model"],
    "plan": ["nothing"],
    "sensitivity": ["nothing"],
    "bench": [],
    "demo": [],
    "device": ["list", "-b", "nothing"],
}
EVERY_MODULE = """
import importlib, pkgutil, sys
import sliplm, sliplm.edge
for module in pkgutil.walk_packages(sliplm.edge.__path__, "sliplm.edge."):
    importlib.import_module(module.name)
print(sliplm.Edge.__name__, *(name for name in sys.argv[1:] if name in sys.modules))
"""


class LightProcess(Process):
    command = tuple(light(SLIP))


def run_light(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*light(SLIP), *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_what_is_hidden_is_not_found() -> None:
    done = subprocess.run(light("import torch"), capture_output=True, text=True, timeout=60)
    assert done.returncode and "No module named 'torch'" in done.stderr


def test_every_module_of_the_edge_is_imported_without_them() -> None:
    heavy = [module for _, modules in EXTRAS.values() for module in modules]
    done = subprocess.run([*light(EVERY_MODULE), *heavy], capture_output=True, text=True, timeout=120)
    assert done.stdout == "Edge\n", done.stderr


def test_a_light_edge_serves_a_trusted_side(run: Any, bundle: Path, tmp_path: Path) -> None:
    """With the native core, and on the portable kernels alone."""
    _, address = start_trusted(run, bundle)
    texts = []
    for start, backend in ((run, ""), (LightProcess, ""), (LightProcess, "portable")):
        edge = start_edge(start, bundle, address, tmp_path / "one.identity", SLIPLM_BACKEND=backend)
        try:
            ready = edge.ready()
            assert backend in ready["kernels"]
            texts.append(ask(ready["api"], "Hello", max_tokens=20))
            assert edge.stop() == 0, edge.log
        finally:
            edge.process.kill()
            edge.process.wait()
            edge.process.stdout.close()
    assert texts[0] and set(texts) == {texts[0]}


def test_every_command_is_known_here() -> None:
    known: Any = typer.main.get_command(app)
    assert set(known.commands) == {*LIGHT, *OWNERS}


@pytest.mark.parametrize("command", [*LIGHT, *OWNERS])
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = run_light(command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


@pytest.mark.parametrize("command", LIGHT)
def test_an_edges_commands_lack_nothing(command: str, tmp_path: Path) -> None:
    done = run_light(command, *LIGHT[command], cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "pip install" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", OWNERS)
def test_an_owners_commands_say_what_they_lack(command: str, tmp_path: Path) -> None:
    done = run_light(command, *OWNERS[command], cwd=tmp_path)
    says = f"slip: `slip {command}` needs the trusted side's packages: pip install 'sliplm[trusted]'."
    assert done.returncode == 1 and " ".join(done.stderr.split()) == says
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_is_not_taken_for_a_missing_package() -> None:
    assert advice("torch.nn", "it") and advice("psycopg", "it") != advice("torch", "it")
    assert advice("sliplm.torch", "it") is advice(None, "it") is None
