"""The link without its TLS, for fuzzing only: a TLS handshake costs more than everything that is fuzzed behind it.

`server` and `client`, called in a process before `slip trusted` or `slip edge` runs there, replace the TLS contexts by
ones that encrypt nothing and believe a peer who says what its certificate is. All else is the real thing.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding


class Plain:
    """What `protocol.session.Session` uses of a TLS session: two bytes with a length and this side's certificate, then
    bytes as they are."""

    def __init__(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, certificate: bytes, server: bool) -> None:
        self._in, self._out = incoming, outgoing
        self._server, self._hello = server, b""
        if certificate and not server:
            outgoing.write(len(certificate).to_bytes(2, "little") + certificate)

    @property
    def _sslobj(self) -> Plain:
        return self

    def do_handshake(self) -> None:
        while missing := self._missing():
            data = self._in.read(missing)
            if not data:
                raise ssl.SSLEOFError if self._in.eof else ssl.SSLWantReadError
            self._hello += data

    def _missing(self) -> int:
        size = 2 + int.from_bytes(self._hello[:2], "little") if len(self._hello) >= 2 else 2
        return size - len(self._hello) if self._server else 0

    def pending(self) -> int:
        return 0

    def read(self, size: int, into: memoryview) -> int:
        data = self._in.read(size)
        if not data and not self._in.eof:
            raise ssl.SSLWantReadError
        into[: len(data)] = data
        return len(data)

    def write(self, data: memoryview) -> int:
        return self._out.write(data)

    def getpeercert(self, _: bool) -> bytes:
        return self._hello[2:]


class Context:
    """What it uses of `ssl.SSLContext`. `certificate` is this side's, in DER form."""

    def __init__(self, certificate: bytes = b"") -> None:
        self._certificate = certificate

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool, **_: Any) -> Plain:
        return Plain(incoming, outgoing, self._certificate, server_side)


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
