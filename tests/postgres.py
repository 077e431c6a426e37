"""A real PostgreSQL, started for the tests that need one."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A PostgreSQL server of our own, on a socket in a directory."""
    # Debian keeps its programs apart, one directory for each version.
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    program = shutil.which("postgres") or next(reversed(versions), None)
    if program is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    binaries = Path(program).resolve().parent
    # Its socket's path has to be short, and the server refuses to run as root.
    home = Path(tempfile.mkdtemp(prefix="slip-", dir="/tmp"))
    user: str | None = None
    if os.geteuid() == 0:
        try:
            shutil.chown(home, pwd.getpwnam("postgres").pw_uid)
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user for it: adduser --system postgres")
        user = "postgres"
    try:
        subprocess.run([binaries / "initdb", "-D", home / "data", "-U", "slip", "-A", "trust", "--no-sync"],
                       check=True, capture_output=True, user=user, cwd=home)  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", home, "-F"],
            stderr=subprocess.PIPE, text=True, user=user, cwd=home)  # fmt: skip
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if "ready to accept connections" in line:
                    break
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield f"postgresql://slip@127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)
