"""Whose certificates a TLS session takes, and that every one is shown afresh; the peers are Python's own, or liars."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from link_fakes import python_context, server_context

from sliplm.protocol import tls
from sliplm.protocol.session import Session
from sliplm.registry import authority


def test_the_peer_is_told_why_its_certificate_is_refused(home: Path, identity: Path, tmp_path: Path) -> None:
    authority.add_device(tmp_path / "other", "stranger", tmp_path / "stranger.pem")
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    stranger.load_cert_chain(tmp_path / "stranger.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname(), 10)
        here = listener.accept()[0]
    said: list[str] = []

    def connect() -> None:
        try:
            with stranger.wrap_socket(there, server_hostname=tls.SERVER_NAME) as sock:
                sock.recv(1)
        except ssl.SSLError as error:
            said.append(error.reason or "")

    thread = threading.Thread(target=connect)
    thread.start()
    here.settimeout(10)
    with here, pytest.raises(ssl.SSLCertVerificationError):
        Session(here, server_context(home))
    thread.join(10)
    assert said and "ALERT" in said[0]


def test_no_session_is_resumed(home: Path, identity: Path) -> None:
    """By our server, that is: of Python's, with its tickets, the same client resumes one."""
    chain, ca = authority.server_files(home)
    pythons = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pythons.load_cert_chain(chain)
    pythons.load_verify_locations(cadata=ca.decode())
    pythons.verify_mode = ssl.CERT_REQUIRED
    ours = server_context(home)
    client = python_context(identity)

    def serve(sock: socket.socket, how: Any) -> None:
        if how is ours:
            Session(sock, ours).write(b"x")
        else:
            how.wrap_socket(sock, server_side=True).sendall(b"x")

    for how in (pythons, ours):
        kept, reused = None, []
        for _ in range(2):
            here, there = socket.socketpair()
            here.settimeout(10)
            there.settimeout(10)
            thread = threading.Thread(target=serve, args=(here, how))
            thread.start()
            with here, client.wrap_socket(there, server_hostname=tls.SERVER_NAME, session=kept) as sock:
                assert sock.recv(1) == b"x"
                kept = sock.session
                reused.append(sock.session_reused)
            thread.join(10)
        assert reused == [False, how is pythons]


def test_a_name_that_is_not_the_trusted_side_s_is_refused(home: Path, identity: Path, tmp_path: Path) -> None:
    """Not even the common name of the right authority's certificate helps: devices choose theirs."""
    path, ca = authority.server_files(home)
    san = x509.SubjectAlternativeName.oid
    for extension in (
        None,
        x509.SubjectAlternativeName([x509.DNSName("other")]),
        x509.SubjectAlternativeName([x509.DNSName("xsliplm-trusted"), x509.DNSName("sliplm-trusted.evil")]),
        x509.UnrecognizedExtension(san, bytes([48, 4, 163, 2, 48, 0])),  # an X.400 address, which nobody reads
    ):
        chain = reissued(path, home / "ca.pem", extension, tmp_path / "server.pem")
        here, there = socket.socketpair()
        here.settimeout(10)
        there.settimeout(10)
        seen: list[Exception] = []

        def serve(sock: socket.socket = here, chain: Path = chain, seen: list[Exception] = seen) -> None:
            try:
                Session(sock, tls.context(chain, ca, None)).read(memoryview(bytearray(1)))
            except OSError as error:
                seen.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        with here, there:
            with pytest.raises(ssl.SSLCertVerificationError) as caught:
                Session(there, tls.client_context(identity))
            thread.join(10)
        assert caught.value.verify_code == 62 and "ALERT" in str(getattr(seen[0], "reason", ""))
        assert str(tls.explain(caught.value, "the trusted side")).endswith("does not belong to a trusted side")


def reissued(path: Path, ca: Path, names: x509.ExtensionType | None, to: Path) -> Path:
    """The certificate in `path`, with its key, for other hosts."""
    key, ca_key = (load_pem_private_key(p.read_bytes(), None) for p in (path, ca))
    old, issuer = (x509.load_pem_x509_certificate(p.read_bytes()) for p in (path, ca))
    builder = x509.CertificateBuilder(issuer.subject, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, extension.critical)
    if names:
        builder = builder.add_extension(names, critical=False)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    certificate = builder.sign(ca_key, hashes.SHA256())
    to.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    return to
