"""Making a connection: addresses, sockets, HELLO and WELCOME."""

from __future__ import annotations

import hmac
import socket
import ssl

from sliplm.errors import LinkError, MismatchError, ProtocolError
from sliplm.protocol import frames, tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Hello, Kind, Role, Welcome
from sliplm.protocol.openssl import Context
from sliplm.protocol.session import secure

Address = tuple[str, int]

CONNECT_SECONDS = 10.0


def tune(sock: socket.socket) -> None:
    """No Nagle delay, and let the kernel notice within half a minute a peer that lost its power or its
    network."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def parse_address(text: str) -> Address:
    """HOST:PORT, with an IPv6 address in brackets. Raises LinkError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise LinkError(f"{text!r} is not an address: write HOST:PORT")
    return host, int(port)


def connect(address: Address, context: Context, role: Role, digest: bytes, timeout: float) -> tuple[Channel, Welcome]:
    """The edge's end of a new connection, after HELLO and WELCOME; `timeout` holds from then on.

    Raises IdentityError, MismatchError or ProtocolError where trying again cannot help, HandshakeError where it might,
    and LinkError, or InternalError, where it can.
    """
    peer = "the trusted side"
    where = f"{address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, CONNECT_SECONDS)
    except socket.gaierror:
        raise LinkError(f"the host of {where} is unknown") from None
    except TimeoutError:
        raise LinkError(f"{where} did not answer within {CONNECT_SECONDS:g} s") from None
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        raise LinkError(f"{peer} at {where} cannot be reached: {why}") from None
    try:
        tune(sock)
        session = secure(sock, context)
    except ssl.SSLError as error:
        sock.close()
        raise tls.explain(error, peer) from None
    except TimeoutError:
        sock.close()
        raise LinkError(f"{peer} at {where} did not answer within {CONNECT_SECONDS:g} s") from None
    except OSError:
        sock.close()
        raise LinkError(f"{peer} at {where} broke off the handshake") from None
    channel = Channel(session, peer, CONNECT_SECONDS)
    try:
        channel.send(Kind.HELLO, frames.pack_hello(Hello(*frames.VERSIONS, role, digest)))
        header = channel.receive()
        if header.kind == Kind.ERROR:
            raise channel.read_error(header)
        if header.kind != Kind.WELCOME:
            raise ProtocolError(f"{peer} answered HELLO with {Kind(header.kind).name}")
        welcome = frames.parse_welcome(channel.read(header))
        check_digest(digest, welcome.digest)
        channel.version = welcome.version
        channel.set_timeout(timeout)
    except BaseException:
        channel.close()
        raise
    return channel, welcome


def check_digest(ours: bytes, theirs: bytes) -> None:
    """Raises MismatchError unless both sides' bundles come from the same split."""
    if not hmac.compare_digest(ours, theirs):
        raise MismatchError("this edge bundle belongs to another split than the trusted bundle")
