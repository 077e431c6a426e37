"""The beginning of a connection: the TLS handshake, HELLO and WELCOME."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

from sliplm.errors import LinkError, ProtocolError
from sliplm.protocol import frames, tls
from sliplm.protocol.channel import Channel, drain_socket
from sliplm.protocol.connect import check_digest
from sliplm.protocol.frames import Kind, Role, Welcome
from sliplm.protocol.openssl import Context
from sliplm.protocol.session import secure
from sliplm.registry import Device, authority
from sliplm.serve.connections import Known

HANDSHAKE_SECONDS = 10.0


def shake_hands(sock: socket.socket, context: Context) -> Channel:
    """The channel over a connection just accepted. Raises HandshakeError or LinkError."""
    try:
        sock.settimeout(HANDSHAKE_SECONDS)
        session = secure(sock, context)
    except (OSError, ValueError) as error:
        drain_socket(sock)  # so that the alert arrives, which tells the edge what is wrong
        if isinstance(error, ssl.SSLError):
            raise tls.explain(error, "the edge") from None
        raise LinkError("the peer did not complete the handshake") from None
    return Channel(session, "the edge", HANDSHAKE_SECONDS)


def greet(
    channel: Channel,
    digest: bytes,
    model_name: Callable[[], str],
    admit: Callable[[str], Device],
    identify: Callable[[Device, Role], Known],
) -> tuple[Device, Known]:
    """HELLO and WELCOME: who this is and what for.

    `admit` finds the device with a certificate, and `identify` counts the connection as its own. What they raise, and
    VersionError, MismatchError and ProtocolError, is sent to the edge, and raised here. Raises LinkError, too.
    """
    try:
        header = channel.receive()
        if header.kind != Kind.HELLO:
            raise ProtocolError("the edge did not start with HELLO")
        hello = frames.parse_hello(channel.read(header))
        version = frames.choose_version(hello)
        device = admit(authority.fingerprint(channel.certificate()))
        check_digest(digest, hello.digest)
        known = identify(device, hello.role)
    except Exception as error:  # without a word, the edge would take it for a broken connection
        with contextlib.suppress(LinkError):
            channel.tell(error)
        raise
    channel.send(Kind.WELCOME, frames.pack_welcome(Welcome(version, digest, model_name())))
    channel.version = version
    return device, known
