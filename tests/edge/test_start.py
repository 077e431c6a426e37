"""How an edge starts: much at once, and nothing from a bundle whose digest was not checked."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from link_fakes import make_engine
from processes import start_edge

from sliplm import bundle
from sliplm.edge.multiplier import Multiplier
from sliplm.edge.serve import ApiServer
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BundleError


@pytest.fixture
def damaged(tiny_split: Path, tmp_path: Path) -> Path:
    """A tiny split whose edge has one wrong bit, in a number of the last matrix."""
    directory = Path(shutil.copytree(tiny_split, tmp_path / "damaged"))
    with (directory / "edge" / bundle.Q_FILE).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    return directory


def test_no_multiplier_is_made_of_a_damaged_bundle(damaged: Path) -> None:
    opening = bundle.EdgeBundle.opening(damaged / "edge")
    for what in (lambda: Multiplier.from_bundle(opening), opening.check):
        with pytest.raises(BundleError, match="SHA-256"):
            what()


def test_a_bundle_that_could_not_be_checked_is_not_taken_for_a_good_one(
    tiny_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(bundle, "_check", no_memory)
    with pytest.raises(MemoryError):
        Multiplier.from_bundle(bundle.EdgeBundle.opening(tiny_split / "edge"))


@pytest.mark.slow
def test_an_edge_with_a_damaged_bundle_never_connects(run: Any, damaged: Path, identity: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        edge = start_edge(run, damaged, "{}:{}".format(*listener.getsockname()), identity)
        assert "is damaged: its SHA-256" in edge.fails()
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_the_api_is_up_without_a_trusted_side_too(identity: Path) -> None:
    worker = EdgeWorker(make_engine(), ("127.0.0.1", 1), identity)
    with contextlib.closing(ApiServer(worker, "127.0.0.1", 0)) as server:
        url = "http://{}:{}".format(*server.address)
        assert httpx.get(f"{url}/healthz", timeout=30).json() == {"status": "ok", "connected": False}
        assert httpx.get(f"{url}/readyz", timeout=30).status_code == 503


def test_an_api_that_is_closed_before_it_has_begun_ends(identity: Path) -> None:
    worker = EdgeWorker(make_engine(), ("127.0.0.1", 1), identity)
    server = ApiServer(worker, "127.0.0.1", 0)
    server.close()
    assert not server._thread.is_alive()
    with pytest.raises(OSError), socket.create_connection(server.address, 5):
        pass


def test_an_api_that_cannot_be_made_is_no_open_port(identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects to it would wait for ever, beside an edge that says it is there."""
    failed = threading.Event()
    monkeypatch.setattr(ApiServer, "_make", lambda _: 1 / 0)
    worker = EdgeWorker(make_engine(), ("127.0.0.1", 1), identity)
    server = ApiServer(worker, "127.0.0.1", 0, failed=failed.set)
    assert failed.wait(30)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address, 5).close()
    server.close()
