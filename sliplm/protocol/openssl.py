"""TLS 1.3 through memory, by the OpenSSL that the package `cryptography` carries, and pyOpenSSL drives.

Python's own `ssl` uses what OpenSSL it was built with. Before 3.1 that knows nothing of the vector instructions that
AES-GCM has had for years, and the bytes of masked vectors are most of what a trusted side's processor does. Besides,
one call here opens all records that are there, into their place. Errors are those of `ssl`, which people know.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from sliplm._core import native

if TYPE_CHECKING:
    from sliplm._core._native import Records

_lib: Any = SSL._lib
_ffi: Any = SSL._ffi
"""For reading and writing: pyOpenSSL's own methods copy every record once more, which costs as much as opening it.
Memory is lent to OpenSSL in `with` blocks: a memoryview that is still lent when the garbage collector finds it, in the
frames of an exception, say, would crash Python (3.11)."""


def _addresses(*names: str) -> list[int]:
    """Of functions of OpenSSL's, for the native core; none if it, or one of them, cannot be had."""
    if native is None:
        return []
    try:
        from cryptography.hazmat.bindings._rust import _openssl

        return [int(_ffi.cast("uintptr_t", _ffi.addressof(_openssl.lib, name))) for name in names]
    except (ImportError, AttributeError, TypeError) as reason:
        logging.getLogger(__name__).warning("the native core does not reach OpenSSL (%s): TLS will be slower", reason)
        return []


FUNCTIONS = _addresses(
    "SSL_read", "SSL_write", "SSL_pending", "SSL_get_error",
    "BIO_read", "BIO_write", "BIO_get_mem_data", "ERR_clear_error",
)  # fmt: skip
"""The addresses that `_core.native.Records` takes; none if records have to be moved by Python."""

HOSTNAME_MISMATCH = 62  # X509_V_ERR_HOSTNAME_MISMATCH


class Context:
    """One side's: its certificate and key, and the authority that the other side's certificate must come from.

    `peer_name`, for a client, must be a host in the server's certificate. Nothing is ever resumed, since the server
    keeps no sessions: each connection proves its certificates afresh. No keys are logged, whatever the environment
    says. Raises ValueError if the key is not the certificate's.

    Attributes:
        native: whether the native core can move the records of its sessions.
    """

    native = bool(FUNCTIONS)

    def __init__(
        self,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        authority: x509.Certificate,
        peer_name: str | None = None,
    ) -> None:
        self._peer_name = peer_name
        self._context = context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_options(SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _verify)
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(crypto.X509.from_cryptography(authority))
        store.set_flags(crypto.X509StoreFlags.X509_STRICT)
        try:
            context.use_certificate(certificate)
            context.use_privatekey(key)
            context.check_privatekey()
        except SSL.Error:
            raise ValueError("the key is not the certificate's") from None

    def session(self) -> Tls:
        """A new one: a client's if there is a `peer_name`, otherwise a server's."""
        return Tls(SSL.Connection(self._context), self._peer_name)


class Tls:
    """One TLS session, of bytes in memory. For one thread at a time. Raises ssl.SSLError.

    What takes no more than a call of OpenSSL's is an attribute, for calls of Python take longer than most of those.

    Attributes:
        room: where the peer's bytes are to be written.
        receive: (room.start, count) takes the first bytes of it, and returns how many.
        received, pending: () how many bytes were received that were not opened, and opened that were not read.
        to_send: () how many bytes there are to send.
        over: whether the peer has ended the session, or it failed.
    """

    def __init__(self, connection: SSL.Connection, peer_name: str | None) -> None:
        self._peer = _Peer(peer_name)
        self._connection = connection
        self._ssl: Any = connection._ssl
        self._out: Any = connection._from_ssl
        self._sealed, self.room = Room(1 << 14), Room(1 << 14)
        self.receive: Callable[[Any, int], int] = partial(_lib.BIO_write, connection._into_ssl)
        start = _ffi.new("char **")  # of the bytes: not used
        self.received: Callable[[], int] = partial(_lib.BIO_get_mem_data, connection._into_ssl, start)
        self.pending: Callable[[], int] = partial(_lib.SSL_pending, self._ssl)
        self.to_send: Callable[[], int] = partial(_lib.BIO_get_mem_data, self._out, start)
        self.over = False
        self._failed: _Failure | None = None
        connection.set_app_data(self._peer)
        if peer_name is None:
            connection.set_accept_state()
        else:
            connection.set_tlsext_host_name(peer_name.encode())
            connection.set_connect_state()

    def __repr__(self) -> str:
        return "Tls(<secret>)"

    def records(self) -> Records:
        """What moves this session's records by the native core, which must be there, and FUNCTIONS."""
        assert native is not None
        ssl_, into, out = (
            int(_ffi.cast("uintptr_t", end)) for end in (self._ssl, self._connection._into_ssl, self._out)
        )
        return native.Records(self._connection, ssl_, into, out, FUNCTIONS)

    def end(self) -> None:
        """The peer will send nothing more."""
        self.over = True
        self._connection.bio_shutdown()

    def handshake(self) -> bool:
        """Do what can be done of it by now; whether it is over."""
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise _failure(error, self._peer.refused).error() from None
        return True

    def certificate(self) -> bytes | None:
        """The peer's in DER form."""
        found = self._connection.get_peer_certificate(as_cryptography=True)
        return None if found is None else found.public_bytes(Encoding.DER)

    def read(self, into: memoryview) -> int | None:
        """Open the records that are here, as far as there is room for them: how many bytes of data; 0 at the end of
        the session. None: more must be received first. Raises ValueError if there is no room at all."""
        if not into:
            raise ValueError("there is no room to read to")
        self.check()
        _lib.ERR_clear_error()  # or a failure of something else in this thread would look like one of this
        result, size, done = 0, len(into), 0
        with _ffi.from_buffer(into, require_writable=True) as start:
            while (result := int(_lib.SSL_read(self._ssl, start + done, size - done))) > 0:
                done += result
                # To be told by OpenSSL that nothing is left would take longer.
                if done == size or not self.received():
                    return done
        return self.stopped(result, done)

    def stopped(self, result: int, done: int) -> int | None:
        """What `read` returns after SSL_read gave no data but `result`, when `done` bytes came before."""
        if _lib.SSL_get_error(self._ssl, result) == _lib.SSL_ERROR_WANT_READ:
            return done or None
        self.over = True
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.ZeroReturnError:
            return done
        except SSL.Error as error:
            self._failed = _failure(error)
        self._failed = self._failed or _Failure(ssl.SSLError)
        if not done:
            raise self._failed.error()
        return done

    def refused(self, result: int) -> NoReturn:
        """Raise why SSL_write, which returned `result`, took no data."""
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as error:
            raise _failure(error).error() from None
        raise _Failure(ssl.SSLError).error()

    def check(self) -> None:
        """Raise why the session failed, if it did."""
        if self._failed is not None:
            raise self._failed.error()

    def seal(self, data: memoryview | bytes = b"") -> memoryview:
        """Seal all of it; what is to be sent, once. The next that is sealed will be in the same place."""
        self.check()
        result, size, done = 0, len(data), 0
        _lib.ERR_clear_error()
        with _ffi.from_buffer(data) as start:
            while done < size and (result := int(_lib.SSL_write(self._ssl, start + done, size - done))) > 0:
                done += result
        if done < size:
            self.refused(result)
        count = self.to_send()
        if count > len(self._sealed.view):
            self._sealed = Room(2 * count)
        if count and _lib.BIO_read(self._out, self._sealed.start, count) != count:
            raise MemoryError
        return self._sealed.view[:count]


class Room:
    """Memory that OpenSSL reads and writes, too: `view` shows it."""

    def __init__(self, size: int) -> None:
        self.start = _ffi.new("char[]", size)
        self.view = memoryview(_ffi.buffer(self.start))


class _Peer:
    """What is known of the other side. (A reference to the session itself would be a cycle.)"""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.refused = 0  # the X509_V_ERR_* that speaks against its certificate


def _verify(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, fine: int) -> bool:
    """Called for every certificate of the peer's chain: OpenSSL's verdict, and whether the name is the right one."""
    peer: _Peer = connection.get_app_data()
    if fine and not depth and peer.name is not None and not _names(certificate, peer.name):
        fine, error = 0, HOSTNAME_MISMATCH
    if not fine:
        peer.refused = error
    return bool(fine)


def _names(certificate: crypto.X509, name: str) -> bool:
    """Whether `name` is one of the hosts' that the certificate is for. Its common name counts for nothing: a device
    chooses its own."""
    try:
        extensions = certificate.to_cryptography().extensions
        hosts = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
        return name in hosts
    except Exception:  # without one, or with one that cannot be read: OpenSSL's callback must not raise
        return False


class _Failure(NamedTuple):
    """Why a session ended. An exception that is kept would keep what its frames know, and them."""

    kind: type[ssl.SSLError]
    reason: str = "unknown"
    verify_code: int = 0

    def error(self) -> ssl.SSLError:
        """A new exception, with the attributes that those of `ssl` have."""
        error = self.kind(ssl.SSL_ERROR_SSL, self.reason)
        error.reason = self.reason.replace(" ", "_").upper()
        if isinstance(error, ssl.SSLCertVerificationError):
            error.verify_code, error.verify_message = self.verify_code, self.reason
        return error


def _failure(error: SSL.Error, refused: int = 0) -> _Failure:
    """What one of pyOpenSSL's exceptions says; `refused` is the verdict on the peer's certificate."""
    if refused:
        sentence: bytes = _ffi.string(_lib.X509_verify_cert_error_string(refused))
        return _Failure(ssl.SSLCertVerificationError, sentence.decode(), refused)
    if isinstance(error, SSL.SysCallError):
        return _Failure(ssl.SSLEOFError, "unexpected eof")
    reasons = [reason for _, _, reason in error.args[0]] if error.args else []
    return _Failure(ssl.SSLError, reasons[0]) if reasons else _Failure(ssl.SSLError)
