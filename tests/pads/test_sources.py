"""Who makes the pads: the edge bundle that the owner names, or the one beside the trusted one, and no other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sliplm.bundle import EdgeBundle, read_trusted_manifest
from sliplm.errors import BundleError
from sliplm.field import P
from sliplm.pads.sources import SelfSource, find_source
from sliplm.prg import expand, fresh_key
from sliplm.split.model import split_model
from sliplm.split.plan import Options


@pytest.fixture
def digest(tiny_split: Path) -> bytes:
    return bytes.fromhex(read_trusted_manifest(tiny_split / "trusted").edge_digest)


@pytest.fixture(scope="module")
def other_split(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "out"
    split_model(str(tiny), out, Options(4), check=False)
    return out


def test_images_are_q_times_r(tiny_split: Path, digest: bytes) -> None:
    edge = EdgeBundle.open(tiny_split / "edge")
    source = SelfSource.open(tiny_split / "edge", digest)
    for group, (rows, columns) in enumerate(edge.shapes):
        key = fresh_key()
        r = expand(key, 0, 3, columns)
        want = r.astype(object) @ edge.matrix(group).T.astype(object) % P
        for threads in (0, 1):
            got = source.image(group, key, 3, threads)
            assert got.shape == (3, rows) and (got == want).all()


def test_the_edge_bundle_beside_is_taken_if_nothing_is_said(tiny_split: Path, digest: bytes, tmp_path: Path) -> None:
    said = find_source(f"self:{tiny_split / 'edge'}", tmp_path, digest)
    beside = find_source(None, tiny_split / "trusted", digest)
    assert len(said.matrices) == len(beside.matrices) == 9


@pytest.mark.parametrize("said", ["", "self:", "helper", "helpers:3", "helpers:", "edge", "self", ":x", "other:x"])
def test_what_is_no_source_is_one_sentence(said: str, tiny_split: Path, digest: bytes) -> None:
    with pytest.raises(BundleError, match="does not say who makes one-time pads"):
        find_source(said, tiny_split / "trusted", digest)


def test_another_splits_matrices_are_refused(tiny_split: Path, other_split: Path, digest: bytes) -> None:
    """Pads from another Q would make every answer wrong, after its check."""
    with pytest.raises(BundleError, match="two different splits"):
        find_source(f"self:{other_split / 'edge'}", tiny_split / "trusted", digest)


def test_the_trusted_bundle_has_no_q_and_fresh_secrets_of_the_check(tiny_split: Path, other_split: Path) -> None:
    trusted = tiny_split / "trusted"
    assert not list(trusted.glob("q*")) and "q.safetensors" not in read_trusted_manifest(trusted).files
    files = (split / "trusted" / "model.safetensors" for split in (tiny_split, other_split))
    with safe_open(next(files), "np") as a, safe_open(next(files), "np") as b:
        names = [name for name in a.keys() if name.endswith(".check_u")]  # noqa: SIM118 - no dictionary
        assert len(names) == 9
        for name in names:
            u = a.get_tensor(name).view(np.uint32)
            assert u.max() < P and not (u == b.get_tensor(name).view(np.uint32)).any()
    edge = (tiny_split / "edge" / "q.safetensors").read_bytes()
    held = (trusted / "model.safetensors").read_bytes()
    assert edge[-200:] not in held and b"check" not in edge


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pads", "said"),
    [
        (None, "nobody makes one-time pads"),
        ("self:nowhere", "nowhere is not a bundle for the edge"),
        ("self:trusted", "is not a bundle for the edge|is not a manifest for the edge"),
        ("nobody", "does not say who makes one-time pads"),
    ],
)
def test_slip_trusted_says_what_is_missing_in_a_sentence(
    pads: str | None, said: str, tiny_split: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_split / "trusted", tmp_path / "trusted")
    options = [] if pads is None else ["--pads", pads.replace("trusted", str(tmp_path / "trusted"))]
    command = [sys.executable, "-m", "sliplm.cli", "trusted", str(tmp_path / "trusted"), "--listen", "127.0.0.1:0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(said, done.stderr)
