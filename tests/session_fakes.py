"""Sessions of ours, native and portable, with Python's own TLS at the other end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from link_fakes import python_context, server_context

from sliplm.protocol import openssl, tls
from sliplm.protocol.session import NativeSession, Session

SESSIONS = [Session, NativeSession] if openssl.FUNCTIONS else [Session]


@pytest.fixture(params=SESSIONS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For modules that import it, every test is of both kinds of sessions."""
    monkeypatch.setattr(sys.modules[__name__], "_kind", request.param)
    return request.param


_kind: type[Session] = Session


def session_of(sock: socket.socket, context: openssl.Context) -> Session:
    """One of the kind under test."""
    return _kind(sock, context)


@contextlib.contextmanager
def connected(home: Path, identity: Path) -> Iterator[tuple[Session, ssl.SSLSocket]]:
    """Our end, the trusted side's, and the edge's as Python makes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname(), 10)
        here = listener.accept()[0]
    here.settimeout(10)
    made: list[Any] = []
    context = python_context(identity)
    thread = threading.Thread(target=lambda: made.append(context.wrap_socket(there, server_hostname=tls.SERVER_NAME)))
    thread.start()
    session = session_of(here, server_context(home))
    thread.join(10)
    with here, made[0]:
        yield session, made[0]


def read(session: Session, seconds: float) -> int:
    return session.read(memoryview(bytearray(1)))


def fill(session: Session, seconds: float) -> int:
    return session.fill(memoryview(bytearray(1)), time.monotonic() + seconds)


def write(session: Session, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += session.write(memoryview(data)[done:])
