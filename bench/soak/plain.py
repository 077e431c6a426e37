"""The link without its TLS, for fuzzing only: a TLS handshake costs more than everything that is fuzzed behind it.

`server` and `client`, called in a process before `slip trusted` or `slip edge` runs there, replace the TLS contexts by
ones that encrypt nothing and believe a peer who says what its certificate is. All else is the real thing.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sliplm.protocol.openssl import Room


class Plain:
    """What `protocol.session.Session` uses of a TLS session: two bytes with a length and this side's certificate, then
    bytes as they are."""

    def __init__(self, certificate: bytes, server: bool) -> None:
        self._server, self._hello = server, b""
        self._in, self._out = bytearray(), bytearray()
        self.over, self.room = False, Room(1 << 14)
        if certificate:
            self._out += len(certificate).to_bytes(2, "little") + certificate

    def receive(self, _: object, count: int) -> int:
        self._in += self.room.view[:count]
        return count

    def end(self) -> None:
        self.over = True

    def handshake(self) -> bool:
        while missing := self._missing():
            data = self._take(missing)
            if not data:
                if self.over:
                    raise ssl.SSLEOFError
                return False
            self._hello += data
        return True

    def _missing(self) -> int:
        size = 2 + int.from_bytes(self._hello[:2], "little") if len(self._hello) >= 2 else 2
        return size - len(self._hello) if self._server else 0

    def _take(self, size: int) -> bytes:
        data = bytes(self._in[:size])
        del self._in[:size]
        return data

    def received(self) -> int:
        return len(self._in)

    def pending(self) -> int:
        return 0

    def to_send(self) -> int:
        return len(self._out)

    def read(self, into: memoryview) -> int | None:
        data = self._take(len(into))
        into[: len(data)] = data
        return len(data) if data or self.over else None

    def seal(self, data: memoryview | bytes = b"") -> memoryview:
        self._out += data
        sealed = memoryview(bytes(self._out))
        self._out.clear()
        return sealed

    def certificate(self) -> bytes | None:
        return self._hello[2:]


class Context:
    """What it uses of `protocol.openssl.Context`. `certificate` is this side's, in DER form; a `server` wants the
    peer's."""

    native = False

    def __init__(self, certificate: bytes = b"", server: bool = False) -> None:
        self._certificate, self._server = certificate, server

    def session(self) -> Plain:
        return Plain(self._certificate, self._server)


def context(identity: Path | str) -> Context:
    """The context of the edge with this identity."""
    own, *_ = x509.load_pem_x509_certificates(Path(identity).read_bytes())
    return Context(own.public_bytes(Encoding.DER))


def server() -> None:
    """For `slip trusted`."""
    from sliplm.protocol import tls

    tls.server_context = lambda *_: Context(server=True)  # type: ignore[assignment,return-value]


def client() -> None:
    """For `slip edge`, which also comes back without a pause."""
    from sliplm.edge import worker
    from sliplm.protocol import tls

    tls.client_context = context  # type: ignore[assignment]
    worker.FIRST_DELAY = worker.LAST_DELAY = 0.0
