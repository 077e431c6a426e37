"""A small certificate authority in a directory: who is the trusted side, and which edges may connect.

    authority/ca.pem         key and certificate of the authority
    authority/server.pem     key and certificate of the trusted side, renewed when it runs out
    authority/devices.json   the registry: every certificate that was handed out, and whether it still counts

Keys are ECDSA P-256 (accepted everywhere, FIPS builds included). A device's certificate allows client
authentication only, and names no host, so a stolen one cannot pose as the trusted side. A certificate that is
not in the registry is refused even if its signature is right, so losing the registry locks devices out, never
in.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from sliplm.errors import IdentityError

SERVER_NAME = "sliplm-trusted"
"""The name in the trusted side's certificate, wherever it runs: edges check this, not an address."""

CA_DAYS = 3650
SERVER_DAYS = 90
RENEW_DAYS = 30
MAX_DEVICE_DAYS = 825
CLOCK_SKEW = timedelta(hours=1)
LOCK_SECONDS = 10.0

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class RegistryError(IdentityError):
    """The registry cannot be read just now, which says nothing about any device. The text is the operator's: it
    names a path."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One certificate that was handed out. `fingerprint` is the SHA-256 of its DER form, in hex."""

    name: str
    fingerprint: str
    created: datetime
    expires: datetime
    revoked: datetime | None = None

    @property
    def active(self) -> bool:
        return self.revoked is None and _now() < self.expires


class _Registry(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    devices: list[Device]


def add_device(directory: Path | str, name: str, out_file: Path | str, days: int = 365) -> Device:
    """Enrol a device: write its identity file (private key, certificate, authority's certificate) to
    `out_file`.

    Creates the authority on first use. The private key exists in that file only. Raises IdentityError for a
    name that is malformed or in use, for `days` outside 1..825, and if `out_file` exists.
    """
    out = Path(out_file)
    if not _NAME.match(name):
        raise IdentityError("a device name has 1 to 64 letters, digits, dots, dashes or underscores")
    if not 1 <= days <= MAX_DEVICE_DAYS:
        raise IdentityError(f"a device's certificate lasts 1 to {MAX_DEVICE_DAYS} days, not {days}")
    with _locked(directory) as home:
        devices = _load_registry(home)
        if any(d.name == name and d.active for d in devices):
            raise IdentityError(f"a device named {name!r} is enrolled already: revoke it or choose another name")
        ca_key, ca_cert = _authority(home)
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _sign(ca_key, ca_cert, key, name, days, Usage.CLIENT_AUTH)
        _write_new(out, _pem_key(key) + _pem(cert) + _pem(ca_cert))
        device = Device(name, fingerprint(_der(cert)), _now(), cert.not_valid_after_utc)
        try:
            _save_registry(home, [*devices, device])
        except BaseException:
            out.unlink(missing_ok=True)
            raise
    return device


def list_devices(directory: Path | str) -> list[Device]:
    """Every certificate ever handed out, oldest first. Raises RegistryError if the registry is damaged."""
    return _load_registry(Path(directory))


def revoke_device(directory: Path | str, name: str) -> Device:
    """Revoke the device `name`. It is disconnected within one keep-alive. Raises IdentityError if there is
    none."""
    with _locked(directory) as home:
        devices = _load_registry(home)
        hits = [i for i, d in enumerate(devices) if d.name == name and d.revoked is None]
        if not hits:
            raise IdentityError(f"no device named {name!r} is enrolled")
        for i in hits:  # more than one if an expired certificate was followed by a new one
            devices[i] = msgspec.structs.replace(devices[i], revoked=_now())
        _save_registry(home, devices)
    return devices[hits[-1]]


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate in DER form, in hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def is_enrolled(directory: Path | str, certificate: str | bytes) -> bool:
    """Whether a certificate, given by fingerprint or in DER form, is enrolled and neither revoked nor
    expired."""
    try:
        admit(directory, certificate)
    except IdentityError:
        return False
    return True


def admit(directory: Path | str, certificate: str | bytes) -> Device:
    """The enrolled device with this certificate (fingerprint or DER). Raises IdentityError, saying why
    not, and RegistryError if nobody can tell."""
    mark = certificate if isinstance(certificate, str) else fingerprint(certificate)
    for device in _load_registry(Path(directory)):
        if device.fingerprint == mark:
            if device.revoked is not None:
                raise IdentityError(f"the device {device.name!r} was revoked")
            if not device.active:
                raise IdentityError(f"the certificate of device {device.name!r} has expired")
            return device
    raise IdentityError("this device is not enrolled with this trusted side")


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
    if (home / "devices.json").exists():
        # A new authority here would strand every enrolled device without anybody noticing why.
        raise IdentityError(f"the authority's file {path} is missing, although devices are enrolled")
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


def _load_registry(home: Path) -> list[Device]:
    path = home / "devices.json"
    try:
        registry = msgspec.json.decode(path.read_bytes(), type=_Registry)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RegistryError(f"the device registry {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RegistryError(f"the device registry {path} is damaged") from None
    if registry.version != 1 or any(d.expires.tzinfo is None for d in registry.devices):
        raise RegistryError(f"the device registry {path} was written by another version of this program")
    return registry.devices


def _save_registry(home: Path, devices: list[Device]) -> None:
    text = msgspec.json.format(msgspec.json.encode(_Registry(1, devices)), indent=2)
    _replace(home / "devices.json", text + b"\n")


@contextlib.contextmanager
def _locked(directory: Path | str) -> Iterator[Path]:
    """The directory (created, and closed to other users), with this process as its only writer."""
    import fcntl  # POSIX only; an edge on another system imports this module but never gets here

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
