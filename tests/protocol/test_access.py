"""Who may connect: certificates, revocation, versions, halves of different splits."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from link_fakes import (
    DIGEST,
    enrol,
    issue,
    make_engine,
    refused,
    revoke_device,
    running,
    scripted,
    serving,
    wait_until,
    working,
)
from OpenSSL import SSL

from sliplm.edge.connection import ATTEMPTS
from sliplm.edge.worker import EdgeWorker
from sliplm.errors import BundleError, IdentityError, LinkError, VersionError
from sliplm.protocol import channel, frames, tls
from sliplm.protocol.connect import connect
from sliplm.protocol.frames import Hello, Role
from sliplm.protocol.openssl import Context, Tls
from sliplm.registry import authority


def test_another_authority_s_edge(home, identity, tmp_path):
    stranger = enrol(tmp_path / "elsewhere")
    end = "-----END CERTIFICATE-----\n"
    mixed = tmp_path / "mixed.pem"  # a stranger who knows our authority's certificate
    mixed.write_text(stranger.read_text().partition(end)[0] + end + identity.read_text().partition(end)[2])
    with serving(home) as server:
        refused(server, stranger, IdentityError, "the trusted side's certificate was issued by another authority")
        refused(server, mixed, IdentityError, "the edge's certificate was issued by another authority")


def test_an_expired_edge(home, identity, tmp_path):
    old = tmp_path / "old.pem"
    issue(home, old, days=-1)
    context = tls.context(old, authority.server_files(home)[1], tls.SERVER_NAME)  # past the edge's own check
    with serving(home) as server:
        refused(server, context, IdentityError, "has expired")


def test_an_expired_trusted_side(home, identity, monkeypatch):
    monkeypatch.setattr(authority, "SERVER_DAYS", -1)
    with serving(home) as server:
        refused(server, identity, IdentityError, "the trusted side's certificate has expired")


def test_an_edge_without_a_certificate(home):
    class Anonymous:
        native = Context.native

        def session(self) -> Tls:
            return Tls(SSL.Connection(SSL.Context(SSL.TLS_METHOD)), tls.SERVER_NAME)

    with serving(home) as server:
        refused(server, Anonymous(), IdentityError, "requires a certificate")


def test_an_edge_that_was_never_registered(home, tmp_path):
    issue(home, tmp_path / "x.pem")
    with serving(home) as server:
        refused(server, tmp_path / "x.pem", IdentityError, "not enrolled")


def test_a_server_s_certificate_is_no_edge_s(home, tmp_path):
    path, ca = authority.server_files(home)
    with serving(home) as server:
        refused(server, tls.context(path, ca, tls.SERVER_NAME), IdentityError, "wrong kind")


def test_an_edge_cannot_pose_as_the_trusted_side(home, identity):
    def as_edge(_: Path) -> Context:
        return tls.context(identity, authority.server_files(home)[1], None)

    with scripted(home, lambda c: None, as_edge) as address:
        with pytest.raises(IdentityError, match=r"wrong kind|does not belong to a trusted side"):
            connect(address, tls.client_context(identity), Role.WORK, DIGEST, 10)
        with pytest.raises(IdentityError):
            EdgeWorker(make_engine(), address, identity).run()


class OnPath:
    """Relays to `target`, or answers every handshake with a plaintext alert, as anybody on the way can."""

    ALERT = bytes([21, 3, 3, 0, 2, 2, 45])  # certificate expired

    def __init__(self, target=None) -> None:
        self.target, self.attempts = target, 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()[:2]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                edge, _ = self._listener.accept()
                self.attempts += 1
                if self.target is None:
                    edge.recv(4096)
                    edge.sendall(self.ALERT)
                    channel.drain_socket(edge)
                    edge.close()
                    continue
                trusted = socket.create_connection(self.target, 10)
                self._open += [edge, trusted]
                for a, b in ((edge, trusted), (trusted, edge)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)

    def attack(self) -> None:
        self.target = None
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_a_forged_alert_ends_no_worker_that_was_connected(home, identity):
    with (
        serving(home) as server,
        contextlib.closing(OnPath(server.address)) as path,
        working(path.address, identity) as worker,  # which fails if `run` raises
    ):
        path.attack()
        wait_until(lambda: path.attempts > ATTEMPTS + 2, 30)
        path.target = server.address
        assert worker.connected.wait(10)


def test_a_worker_that_never_was_connected_gives_up_soon_and_says_why(home, identity):
    with contextlib.closing(OnPath()) as path, pytest.raises(IdentityError, match="has expired"):
        EdgeWorker(make_engine(), path.address, identity).run()
    assert path.attempts == ATTEMPTS


def test_a_passing_failure_of_the_handshake_is_tried_again(home, identity):
    with serving(home) as server, contextlib.closing(OnPath()) as path:
        worker = EdgeWorker(make_engine(), path.address, identity)
        with running(worker.run, worker.stop) as raised:
            wait_until(lambda: path.attempts >= 2)
            path.target = server.address
            assert worker.connected.wait(10), raised


def test_an_identity_that_expires_on_the_way_is_final_at_once(home, identity):
    with contextlib.closing(OnPath()) as path:
        worker = EdgeWorker(make_engine(), path.address, identity)
        issue(home, identity, days=-1)
        with pytest.raises(IdentityError, match="enrol this device again"):
            worker.run()
        assert path.attempts == 1


def test_older_tls_is_refused(home, identity):
    context = tls.client_context(identity)
    context._context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context._context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with serving(home) as server:
        refused(server, context, LinkError, "the encrypted connection to the trusted side failed")


def test_a_revoked_edge_is_refused_and_its_worker_stops(home, identity):
    revoke_device(home, "laptop")
    with serving(home) as server:
        refused(server, identity, IdentityError, "was revoked")
        with pytest.raises(IdentityError, match="was revoked"):
            EdgeWorker(make_engine(), server.address, identity).run()


def test_revoking_cuts_a_connected_edge_off(home, identity):
    with serving(home, keepalive=0.1) as server:
        worker = EdgeWorker(make_engine(), server.address, identity)
        with running(worker.run, worker.stop) as raised:
            assert worker.connected.wait(10)
            revoke_device(home, "laptop")
            wait_until(lambda: bool(raised))
    assert isinstance(raised[0], IdentityError)


def test_halves_of_different_splits(home, identity):
    with serving(home, digest=bytes(32)) as server:
        refused(server, identity, BundleError, "belongs to another split")
        with pytest.raises(BundleError, match="belongs to another split"):
            EdgeWorker(make_engine(), server.address, identity).run()


def test_the_edge_checks_the_digest_itself(home, identity):
    with scripted(home, lambda c: None) as address, pytest.raises(BundleError):
        connect(address, tls.client_context(identity), Role.WORK, bytes(32), 10)


def test_no_common_version(home, identity, monkeypatch):
    with serving(home) as server:
        pack = frames.pack_hello
        monkeypatch.setattr(frames, "pack_hello", lambda hello: pack(Hello(1, 1, hello.role, hello.digest)))
        refused(server, identity, VersionError, "the edge speaks protocol version 1, the trusted side versions 2 to 4")
        with pytest.raises(VersionError, match="update the older one"):
            EdgeWorker(make_engine(), server.address, identity).run()


def test_an_edge_of_another_kind_is_refused_for_good(home, identity, monkeypatch):
    with serving(home) as server:
        pack = frames.pack_hello
        monkeypatch.setattr(frames, "pack_hello", lambda hello: b"SLOP" + pack(hello)[4:])
        refused(server, identity, VersionError, "does not speak this protocol")
