"""The edge's API without a trusted side: a backend that says "Hello", and what its answers look like."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import uvicorn
from link_fakes import running, wait_until
from starlette.testclient import TestClient

from sliplm.protocol.messages import Chunk, GenerateRequest

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Backend:
    """Yields "Hel", "lo", "" and remembers what was asked; fails with `error` before chunk number `after`."""

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        self.asked: list[GenerateRequest] = []
        self.error, self.after = error, after

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        for i, chunk in enumerate([Chunk("Hel"), Chunk("lo"), Chunk("", "stop", 3, 2)]):
            if self.error and i == self.after:
                raise self.error
            yield chunk


def local(app, **options) -> TestClient:
    return TestClient(app, base_url="http://localhost", **options)


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

        def stop() -> None:
            server.should_exit = True

        with running(lambda: server.run([sock]), stop):
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def events(response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]
