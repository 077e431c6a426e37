"""The link without its TLS, for fuzzing only: a TLS handshake costs more than everything that is fuzzed behind it.

`server` and `client`, called in a process before `slip trusted` or `slip edge` runs there, replace the TLS contexts by
ones that encrypt nothing and believe a peer who says what its certificate is. All else is the real thing.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding


class Socket(socket.socket):
    """What the link uses of `ssl.SSLSocket`."""

    theirs = b""

    def do_handshake(self) -> None:
        count = int.from_bytes(self._exactly(2), "little")
        self.theirs = self._exactly(count)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.recv(count - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    @property
    def _sslobj(self) -> Socket | None:
        """What stands for the TLS session: itself, while it is open."""
        return self if self.fileno() >= 0 else None

    def pending(self) -> int:
        return 0

    def read(self, size: int, into: memoryview) -> int:
        return self.recv_into(into, size)

    def write(self, data: memoryview) -> int:
        return self.send(data)

    def getpeercert(self, binary_form: bool = False) -> bytes:
        return self.theirs


class Context:
    """What the link uses of `ssl.SSLContext`. `certificate` is this side's, in DER form."""

    def __init__(self, certificate: bytes = b"") -> None:
        self._certificate = certificate

    def wrap_socket(self, sock: socket.socket, server_side: bool = False, **_: Any) -> Socket:
        timeout = sock.gettimeout()
        wrapped = Socket(fileno=sock.detach())
        wrapped.settimeout(timeout)
        if not server_side:
            wrapped.sendall(len(self._certificate).to_bytes(2, "little") + self._certificate)
        return wrapped


def context(identity: Path | str) -> Context:
    """The context of the edge with this identity."""
    own, *_ = x509.load_pem_x509_certificates(Path(identity).read_bytes())
    return Context(own.public_bytes(Encoding.DER))


def server() -> None:
    """For `slip trusted`."""
    from sliplm.protocol import tls

    tls.server_context = lambda *_: Context()  # type: ignore[assignment]


def client() -> None:
    """For `slip edge`, which also comes back without a pause."""
    from sliplm.edge import worker
    from sliplm.protocol import tls

    tls.client_context = context  # type: ignore[assignment]
    worker.FIRST_DELAY = worker.LAST_DELAY = 0.0
