"""A small certificate authority in a directory: who is the trusted side, and which edges and helpers may connect.

    authority/ca.pem         key and certificate of the authority
    authority/server.pem     key and certificate of the trusted side, renewed when it runs out
    authority/registry.db    the registry (sliplm/registry): every certificate that was handed out, and whether it
                             still counts; or a database elsewhere

Keys are ECDSA P-256 (accepted everywhere, FIPS builds included). A device's certificate allows client
authentication only, and names no host, so a stolen one cannot pose as the trusted side. A certificate that is
not in the registry is refused even if its signature is right, so losing the registry locks devices out, never
in.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from sliplm.errors import IdentityError
from sliplm.pads import parties
from sliplm.protocol.tls import SERVER_NAME
from sliplm.registry import Device, Limits, Registry

CA_DAYS = 3650
SERVER_DAYS = 90
RENEW_DAYS = 30
MAX_DEVICE_DAYS = 825
CLOCK_SKEW = timedelta(hours=1)
LOCK_SECONDS = 10.0
REGISTRY = "registry.db"


def open_registry(directory: Path | str, url: str | None = None) -> Registry:
    """The registry of the authority in `directory`: the database at `url`, or else the file `registry.db` there.

    Creates both on first use. Raises IdentityError for a damaged authority, and RegistryError.
    """
    with _locked(directory) as home:
        return _registry(home, url)


def add_device(
    directory: Path | str,
    name: str,
    out_file: Path | str,
    days: int = 365,
    *,
    limits: Limits | None = None,
    registry: str | None = None,
    party: str | None = None,
    edge: bool = True,
    helper: bool = False,
) -> Device:
    """Enrol a device: write its identity file (private key, certificate, authority's certificate) to
    `out_file`.

    Creates the authority on first use. The private key exists in that file only. `registry` is a URL as in
    `open_registry`, `party` whose device it is, which is fixed for good: its own name if absent. Raises IdentityError
    for a name that is malformed or in use, for a malformed party, for a device that may be neither edge nor helper, for
    `days` outside 1..825, and if `out_file` exists.
    """
    out = Path(out_file)
    party = name if party is None else party
    for what, given in (("device", name), ("party", party)):
        if not parties.NAME.match(given):
            raise IdentityError(f"a {what} name has 1 to 64 letters, digits, dots, dashes or underscores")
    if not (edge or helper):
        raise IdentityError(f"the device {name!r} has to be an edge, a helper, or both")
    if not 1 <= days <= MAX_DEVICE_DAYS:
        raise IdentityError(f"a device's certificate lasts 1 to {MAX_DEVICE_DAYS} days, not {days}")
    with _locked(directory) as home, _registry(home, registry) as opened:
        ca_key, ca_cert = _authority(home)
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _sign(ca_key, ca_cert, key, name, days, Usage.CLIENT_AUTH)
        _write_new(out, _pem_key(key) + _pem(cert) + _pem(ca_cert))
        try:
            return opened.devices.add(
                Device(
                    name=name,
                    party=party,
                    edge=edge,
                    helper=helper,
                    fingerprint=fingerprint(_der(cert)),
                    added=_now(),
                    expires=cert.not_valid_after_utc,
                    limits=limits or Limits(),
                )
            )
        except BaseException:
            out.unlink(missing_ok=True)
            raise


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate in DER form, in hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def server_files(directory: Path | str) -> tuple[Path, bytes]:
    """The PEM file with the trusted side's key and certificate, and the authority's certificate (PEM).

    Creates both on first use, and a new server certificate when less than 30 days of the old one are left.
    """
    with _locked(directory) as home:
        ca_key, ca_cert = _authority(home)
        path = home / "server.pem"
        if not _is_fresh(path, ca_cert):
            key = ec.generate_private_key(ec.SECP256R1())
            cert = _sign(ca_key, ca_cert, key, SERVER_NAME, SERVER_DAYS, Usage.SERVER_AUTH, dns=SERVER_NAME)
            _replace(path, _pem_key(key) + _pem(cert))
        return path, _pem(ca_cert)


# --- certificates -------------------------------------------------------------------------------------------


def _authority(home: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    path = home / "ca.pem"
    if path.exists():
        try:
            data = path.read_bytes()
            key = serialization.load_pem_private_key(data, password=None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return key, x509.load_pem_x509_certificate(data)
        except (OSError, ValueError, TypeError):
            pass
        raise IdentityError(f"the authority's file {path} cannot be read or is damaged")
    if any((home / name).exists() for name in (REGISTRY, "server.pem")):
        # A new authority here would strand every enrolled device without anybody noticing why.
        raise IdentityError(f"the authority's file {path} is missing, although devices may be enrolled")
    key = ec.generate_private_key(ec.SECP256R1())
    # The random part keeps two authorities apart in error messages and in OpenSSL's issuer look-up.
    cert = _sign(key, None, key, f"sliplm authority {os.urandom(4).hex()}", CA_DAYS, None)
    _replace(path, _pem_key(key) + _pem(cert))
    return key, cert


def _sign(
    ca_key: ec.EllipticCurvePrivateKey,
    ca_cert: x509.Certificate | None,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    days: float,
    usage: x509.ObjectIdentifier | None,
    dns: str | None = None,
) -> x509.Certificate:
    """A certificate for `key`; without `ca_cert` a self-signed authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    is_ca = ca_cert is None
    end = _now() + timedelta(days=days)
    if ca_cert is not None:
        end = min(end, ca_cert.not_valid_after_utc)
    ca_public = ca_key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if ca_cert is None else ca_cert.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(_now(), end) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(_key_usage(is_ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_public), critical=False)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
    if dns is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _key_usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_fresh(path: Path, ca_cert: x509.Certificate) -> bool:
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        raise IdentityError(f"the certificate file {path} cannot be read or is damaged") from None
    return cert.issuer == ca_cert.subject and cert.not_valid_after_utc > _now() + timedelta(days=RENEW_DAYS)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.DER)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


# --- files --------------------------------------------------------------------------------------------------


def _registry(home: Path, url: str | None) -> Registry:
    _authority(home)  # so that none is missing where a registry is
    return Registry(url or home / REGISTRY)


@contextlib.contextmanager
def _locked(directory: Path | str) -> Iterator[Path]:
    """The directory (created, and closed to other users), with this process as its only writer."""
    home = Path(directory)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        handle = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise IdentityError(f"the authority's directory {home} cannot be used: {error.strerror}") from None
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise IdentityError(f"another process is busy with {home}: try again") from None
                time.sleep(0.02)
        yield home
    finally:
        os.close(handle)  # also releases the lock


def _temporary(target: Path, data: bytes) -> Path:
    """`data`, safely on disk, mode 0600, in a new file beside `target`."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mkstemp: mode 0600
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk, say: leave nothing behind
        path.unlink(missing_ok=True)
        raise
    return path


def _replace(path: Path, data: bytes) -> None:
    try:
        _temporary(path, data).replace(path)
    except OSError as error:
        raise IdentityError(f"{path} cannot be written: {error.strerror}") from None


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet; it appears complete or not at all."""
    temporary = None
    try:
        if path.exists() or path.is_symlink():
            raise FileExistsError
        temporary = _temporary(path, data)
        try:
            path.hardlink_to(temporary)  # unlike rename, never overwrites
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links, such as a memory stick
            temporary.rename(path)
    except FileExistsError:
        raise IdentityError(f"{path} exists already and is not overwritten") from None
    except OSError as error:
        raise IdentityError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
