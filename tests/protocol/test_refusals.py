"""What a client of the edge's API is told when the trusted side does not serve this edge: one sentence, the right
status, and the same for the list of models, which clients often ask for first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from link_fakes import enrol, make_engine, revoke_device, serving, working

from sliplm.edge.serve import ApiServer
from sliplm.edge.worker import EdgeWorker
from sliplm.protocol import frames
from sliplm.protocol.frames import Hello


@contextlib.contextmanager
def api(worker: EdgeWorker) -> Iterator[httpx.Client]:
    """A client of `worker`'s API."""
    with contextlib.closing(ApiServer(worker, "127.0.0.1", 0)) as server:
        url = "http://{}:{}".format(*server.address)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            yield client


def tell(client: httpx.Client, status: int, says: str) -> None:
    """A request for text, streamed or not, and then one for the models are answered so."""
    body = {"prompt": "x", "max_tokens": 2}
    texts = [client.post("/v1/completions", json=body | {"stream": stream}) for stream in (False, True)]
    for answer in (*texts, client.get("/v1/models")):
        message = answer.json()["error"]["message"]
        assert answer.status_code == status and says in message and "\n" not in message
        assert answer.headers.get("x-should-retry") == (None if status == 503 else "false")


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("of another authority", 403, "the trusted side's certificate was issued by another authority"),
        ("signed by another authority", 403, "the edge's certificate was issued by another authority"),
        ("revoked", 403, "the device 'laptop' was revoked"),
        ("of another bundle", 403, "this edge bundle belongs to another split"),
        ("of an older version", 403, "the edge speaks protocol version 1, the trusted side versions 2 to 4"),
        ("of no trusted side", 503, "cannot be reached: Connection refused"),
    ],
)
def test_an_edge_that_is_not_served(home, identity, tmp_path, monkeypatch, what, status, says):
    stranger = enrol(tmp_path / "elsewhere")
    if what == "of another authority":
        identity = stranger
    elif what == "signed by another authority":
        end = "-----END CERTIFICATE-----\n"
        mixed = stranger.read_text().partition(end)[0] + end + identity.read_text().partition(end)[2]
        identity = tmp_path / "mixed.identity"
        identity.write_text(mixed)
    elif what == "revoked":
        revoke_device(home, "laptop")
    elif what == "of an older version":
        pack = frames.pack_hello
        monkeypatch.setattr(frames, "pack_hello", lambda hello: pack(Hello(1, 1, hello.role, hello.digest)))
    engine = make_engine(digest=bytes(32)) if what == "of another bundle" else make_engine()
    with serving(home) as server:
        worker = EdgeWorker(engine, ("127.0.0.1", 1) if "no trusted" in what else server.address, identity)
        with api(worker) as client:
            tell(client, status, says)


def test_an_edge_whose_worker_is_not_connected(home: Path, identity: Path) -> None:
    with serving(home, worker_wait=0.1) as server, api(EdgeWorker(make_engine(), server.address, identity)) as client:
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and "no edge is connected" in answer.json()["error"]["message"]


def test_a_fault_inside_the_trusted_side(home: Path, identity: Path) -> None:
    with serving(home) as server, working(server, identity) as worker, api(worker) as client:
        answer = client.post("/v1/completions", json={"prompt": "boom"})
        assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["message"] == "generation failed on the trusted side; its log says why"


def test_a_failure_is_that_of_the_last_connection(home: Path, identity: Path) -> None:
    with serving(home, worker_wait=0.1) as server:
        worker = EdgeWorker(make_engine(), ("127.0.0.1", 1), identity)
        with api(worker) as client:
            tell(client, 503, "cannot be reached")
            worker._address = server.address
            client.post("/v1/completions", json={"prompt": "boom"})  # no worker, but it was connected
            assert worker.failure is None and client.get("/v1/models").status_code == 200
