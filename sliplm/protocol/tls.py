"""Whose certificates count: the contexts of a trusted side and of an edge, and the errors of TLS as sentences."""

from __future__ import annotations

import logging
import ssl
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sliplm.errors import HandshakeError, IdentityError, LinkError, SlipError
from sliplm.protocol.openssl import Context

SERVER_NAME = "sliplm-trusted"
"""The name in the trusted side's certificate, wherever it runs: edges check this, not an address."""

_log = logging.getLogger(__name__)


def server_context(chain: Path, ca_pem: bytes) -> Context:
    """The trusted side's context, from what `registry.authority.server_files` gives. Raises IdentityError."""
    return context(chain, ca_pem, None)


def client_context(identity: Path | str) -> Context:
    """An edge's context, from the identity file that `registry.authority.add_device` wrote. Raises IdentityError."""
    path = Path(identity)
    ca_pem = _check_identity(path)
    return context(path, ca_pem, SERVER_NAME)


def context(chain: Path, ca_pem: bytes, peer_name: str | None) -> Context:
    """For who has the key and the certificate in `chain`, and believes the authority `ca_pem` alone; a client names its
    peer. Raises IdentityError."""
    try:
        data = chain.read_bytes()
        own, key = x509.load_pem_x509_certificates(data)[0], serialization.load_pem_private_key(data, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):  # as the authority makes them
            raise ValueError
        return Context(own, key, x509.load_pem_x509_certificate(ca_pem), peer_name)
    except (OSError, ValueError, TypeError):
        raise IdentityError(f"{chain} does not hold a matching key and certificate") from None


def _check_identity(path: Path) -> bytes:
    """The authority's certificate (PEM) in an identity file that is well-formed and in date."""
    try:
        data = path.read_bytes()
        if path.stat().st_mode & 0o077:
            _log.warning("other users of this machine can read the identity file %s: chmod 600 it", path)
    except OSError as error:
        raise IdentityError(f"the identity file {path} cannot be read: {error.strerror}") from None
    try:
        serialization.load_pem_private_key(data, password=None)
        own, ca = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError):
        raise IdentityError(f"{path} is not an identity file, or it is damaged") from None
    now = datetime.now(timezone.utc)
    if now > own.not_valid_after_utc:
        day = own.not_valid_after_utc.date()
        raise IdentityError(f"the identity file {path} expired on {day}: enrol this device again")
    if now < own.not_valid_before_utc:
        raise IdentityError(f"the identity file {path} is not valid yet: check this machine's clock")
    return ca.public_bytes(serialization.Encoding.PEM)


# X509_V_ERR_* of OpenSSL's x509_vfy.h -> what it means between an edge and a trusted side.
_VERIFY = {
    9: "is not valid yet: check both clocks",
    10: "has expired",
    18: "was issued by another authority",
    19: "was issued by another authority",
    20: "was issued by another authority",
    21: "was issued by another authority",
    7: "was issued by another authority",
    26: "is of the wrong kind: an edge cannot pose as a trusted side, nor the other way round",
    62: "does not belong to a trusted side",
}

# TLS alerts, as OpenSSL spells them (the prefix varies), -> what the peer thought of our certificate. Clients of an
# edge's API read them too, so "this side" would say nothing.
_ALERTS = {
    "ALERT_CERTIFICATE_EXPIRED": "{us}'s certificate has expired",
    "ALERT_CERTIFICATE_REVOKED": "{us}'s certificate was revoked",
    "ALERT_CERTIFICATE_REQUIRED": "the other side requires a certificate",
    "ALERT_UNKNOWN_CA": "{us}'s certificate was issued by another authority",
    "ALERT_BAD_CERTIFICATE": "{us}'s certificate was rejected",
    "ALERT_CERTIFICATE_UNKNOWN": "{us}'s certificate was rejected",
    "ALERT_UNSUPPORTED_CERTIFICATE": "{us}'s certificate is of the wrong kind",
    "ALERT_ACCESS_DENIED": "{us}'s certificate was rejected",
    "ALERT_DECRYPT_ERROR": "{us}'s certificate was issued by another authority",
}


def explain(error: ssl.SSLError, peer: str) -> SlipError:
    """`error` as a HandshakeError if a certificate is at fault, otherwise as a LinkError. `peer` names the
    other side: "the trusted side" or "the edge"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = _VERIFY.get(error.verify_code, f"was rejected ({error.verify_message})")
        return HandshakeError(f"{peer}'s certificate {why}")
    reason = getattr(error, "reason", None) or ""  # those that Python code makes may have none
    for alert, sentence in _ALERTS.items():
        if alert in reason:
            return HandshakeError(sentence.format(us="the edge" if peer == "the trusted side" else "the trusted side"))
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return LinkError(f"{peer} closed the connection")
    what = reason.replace("_", " ").lower() or "unknown reason"
    return LinkError(f"the encrypted connection to {peer} failed ({what})")
