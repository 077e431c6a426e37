"""Processes that run out of something: disk, file descriptors, time, a lock."""

from __future__ import annotations

import resource
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from link_fakes import list_devices

from bench.soak.processes import Site, ask, eventually, site, text
from sliplm.errors import SlipError
from sliplm.registry import authority

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "Hello", 6


@pytest.fixture
def here(tiny_split: Path) -> Iterator[Site]:
    with site(tiny_split) as one:
        yield one


def full_disk() -> None:
    """No file may grow beyond a few lines: enough for the sentence in the log, and for nothing else."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))


def sentence(log: Path) -> str:
    """The one thing that a command said before it failed."""
    said = log.read_text()
    assert "Traceback" not in said
    assert "slip: " in said, said
    return said


def test_a_first_start_on_a_full_disk(here: Site) -> None:
    here.registry.close()
    shutil.rmtree(here.bundle / "trusted" / "authority")
    command = here.start("trusted", here.bundle / "trusted", "--listen", "127.0.0.1:0", before=full_disk)
    assert command.wait(60) == 1
    sentence(command.log)
    trusted, _ = here.trusted()  # it left nothing behind that stands in the way
    assert trusted.stop() == 0


def test_no_device_is_half_enrolled_on_a_full_disk(here: Site) -> None:
    out = here.scratch / "laptop.identity"
    command = here.start("device", "add", "laptop", "-b", here.bundle / "trusted", "-o", out, before=full_disk)
    assert command.wait(60) == 1
    sentence(command.log)
    assert not out.exists()
    assert [d.name for d in list_devices(here.bundle / "trusted" / "authority")] == []
    assert here.enrol("laptop").exists()


def test_a_disk_that_fills_up_while_serving(here: Site) -> None:
    """Usage cannot be recorded then, so requests are refused, with a sentence, until there is room again."""
    trusted, address = here.trusted()
    api = here.edge(address, here.enrol("one")).ready()["api"]
    truth = text(api, PROMPT, TOKENS)
    process = psutil.Process(trusted.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
    with pytest.raises(SlipError, match="record"):
        text(api, PROMPT, TOKENS)
    process.rlimit(psutil.RLIMIT_FSIZE, before)
    assert eventually(lambda: text(api, PROMPT, TOKENS), 10) == truth
    assert not trusted.complaints()


def test_a_locked_registry(here: Site) -> None:
    """The same, and nobody is refused for good: a device that cannot be looked up just now may be enrolled."""
    trusted, address = here.trusted()
    edge = here.edge(address, here.enrol("one"))
    api = edge.ready()["api"]
    truth = text(api, PROMPT, TOKENS)
    lock = sqlite3.connect(here.bundle / "trusted" / "authority" / "registry.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SlipError, match="try again"):
        text(api, PROMPT, TOKENS)
    lock.execute("ROLLBACK")
    lock.close()
    assert eventually(lambda: text(api, PROMPT, TOKENS), 10) == truth
    assert edge.alive and not trusted.complaints()


def test_no_file_descriptor_is_left(here: Site) -> None:
    trusted, address = here.trusted()
    edge = here.edge(address, here.enrol("one"))
    api = edge.ready()["api"]
    truth = text(api, PROMPT, TOKENS)
    process = psutil.Process(trusted.pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 4, before[1]))
    host, port = address.rsplit(":", 1)
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    time.sleep(1)
    assert trusted.alive and edge.alive
    for sock in silent:
        sock.close()
    assert eventually(lambda: text(api, PROMPT, TOKENS), 20) == truth  # even so
    process.rlimit(psutil.RLIMIT_NOFILE, before)
    assert text(api, PROMPT, TOKENS) == truth
    assert not trusted.complaints()


def test_an_expired_identity_is_named(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enrolled three days ago, for one day."""
    _, address = here.trusted()
    with monkeypatch.context() as past:
        now = authority._now() - timedelta(days=3)
        past.setattr(authority, "_now", lambda: now)
        identity = here.scratch / "old.identity"
        authority.add_device(here.bundle / "trusted" / "authority", "old", identity, days=1)
    edge = here.edge(address, identity)
    assert edge.wait(30) == 1
    assert "expired" in sentence(edge.log)


@pytest.mark.parametrize("side", ["trusted", "edge"])
def test_sigterm_under_load(here: Site, side: str) -> None:
    """Texts come to their end or break off with an error; nothing hangs, and the exit is a clean one."""
    trusted, address = here.trusted()
    edge = here.edge(address, here.enrol("one"))
    api = edge.ready()["api"]
    truth = text(api, PROMPT, 40)
    wrong: list[str] = []
    begun = threading.Barrier(5)

    def client() -> None:
        got = ""
        waiting = True
        try:
            for chunk in ask(api, PROMPT, 40):
                got += chunk.text
                if waiting:
                    waiting = False
                    begun.wait(30)
            if got != truth:
                wrong.append(got)
        except SlipError:
            if not truth.startswith(got):
                wrong.append(got)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    command = trusted if side == "trusted" else edge
    assert command.stop(60) == 0
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong
    assert not trusted.complaints() and not edge.complaints()
