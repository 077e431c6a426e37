"""How light an edge is: the size of its packages, the time to its first handshake, its memory beyond its bundle.

    python bench/edge_start.py [DIR] [--python PYTHON] [--rounds 7]

DIR is what `slip split` wrote; without it SmolLM2 is split. PYTHON is that of an environment with an edge's packages
alone; without it one is made, of requirements-edge.txt and of this source. The trusted side here is a server without a
model, so what is measured is the edge: from the start of its process until the server has its connection, by which time
its bundle has been checked and every matrix is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sliplm.bundle import EdgeBundle
from sliplm.demo import find_smollm2
from sliplm.exchange.link import Link
from sliplm.field import P
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.registry import authority
from sliplm.serve.server import TrustedServer
from sliplm.split.model import split_model

ROOT = Path(__file__).parent.parent
LAPS = (
    ("handshake", "the first handshake"),
    ("processor", "the first handshake, of processor time"),
    ("product", "the first product"),
    ("ready", "the line that it is ready"),
)
TOOLS = ("pip", "setuptools", "wheel")  # they install, and an edge does not run on them


class NoModel:
    """What the server serves: nothing."""

    capacity = 1
    shows = False

    def model_name(self) -> str:
        return "none"

    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        yield Chunk("", "stop", 1, 0)


def make_environment(directory: Path) -> str:
    """The Python of a new environment with an edge's packages."""
    python = str(directory / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", ROOT / "requirements-edge.txt"], check=True)
    subprocess.run([*install, "--no-deps", ROOT], check=True)
    return python


def size_of_packages(python: str) -> dict[str, float]:
    """MB on the disk of every distribution that is installed there, compiled files included."""
    code = (
        "import importlib.metadata, json\n"
        "size = lambda d: sum(f.locate().stat().st_size for f in d.files or () if f.locate().exists())\n"
        "print(json.dumps({d.name: size(d) / 1e6 for d in importlib.metadata.distributions()}))\n"
    )
    found = json.loads(subprocess.check_output([python, "-c", code]))
    return {name: size for name, size in found.items() if name not in TOOLS}


@contextlib.contextmanager
def trusted_side(bundle: EdgeBundle, home: Path) -> Iterator[TrustedServer]:
    server = TrustedServer(NoModel(), bundle.digest, bundle.shapes, home)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_start(python: str, edge: Path, server: TrustedServer, identity: Path, shapes: list[Any]) -> dict[str, float]:
    """Seconds to the handshake, to the first product and to the API, and of processor time until the handshake; MB in
    memory after a product of every matrix."""
    line = [python, "-m", "sliplm.cli", "edge", edge.resolve(), "--trusted", "{}:{}".format(*server.address)]
    line += ["--identity", identity, "--api", "127.0.0.1:0", "--json"]
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    # Elsewhere than in the source, which would be taken for the package, without its native core.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": identity.parent}
    with subprocess.Popen(line, **pipes) as process:
        try:
            while not (links := server.links()):
                time.sleep(0.001)
                if process.poll() is not None:
                    sys.exit(process.stderr.read())
            result = {"handshake": time.perf_counter() - began, "processor": processor_seconds(process.pid)}
            for group, (_, columns) in enumerate(shapes):
                links[-1].exchange(group, rng.integers(0, P, (1, columns)).astype(np.uint32), lambda: None)
                result.setdefault("product", time.perf_counter() - began)
            process.stdout.readline()
            result["ready"] = time.perf_counter() - began
            status = dict(part.split(":") for part in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            for name, field in (("resident", "VmRSS"), ("peak", "VmHWM")):
                result[name] = int(status[field].split()[0]) * 1024 / 1e6
        finally:
            process.kill()
    while server.links():
        time.sleep(0.01)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--python")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = given.python or make_environment(Path(scratch) / "environment")
        sizes = size_of_packages(python)
        directory = given.directory
        if directory is None:
            split_model(find_smollm2(), directory := Path(scratch) / "bundle")
        edge = directory / "edge"
        bundle = EdgeBundle.open(edge)
        megabytes = sum(file.stat().st_size for file in edge.iterdir()) / 1e6
        identity = Path(scratch) / "bench.identity"
        authority.add_device(Path(scratch) / "authority", "bench", identity)
        with trusted_side(bundle, Path(scratch) / "authority") as server:
            starts = [one_start(python, edge, server, identity, bundle.shapes) for _ in range(given.rounds)]
    largest = ", ".join(f"{name} {sizes[name]:.0f}" for name in sorted(sizes, key=sizes.__getitem__)[:-5:-1])
    print(f"packages: {sum(sizes.values()):.0f} MB in {len(sizes)} ({largest})")
    for name, what in LAPS:
        seconds = [start[name] for start in starts]
        print(f"seconds to {what}: median {statistics.median(seconds):.2f}, least {min(seconds):.2f}")
    for name, what in (("resident", "resident"), ("peak", "at most, at any time")):
        most = max(start[name] for start in starts)
        print(f"memory, {what}: {most:.0f} MB, {most - megabytes:.0f} over the bundle's {megabytes:.0f}")


if __name__ == "__main__":
    main()
