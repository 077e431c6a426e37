"""The authority: what it writes, whom it admits, and what it refuses."""

from __future__ import annotations

import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from link_fakes import issue, list_devices, revoke_device

from sliplm.errors import IdentityError
from sliplm.protocol import tls
from sliplm.registry import Device, authority
from sliplm.registry import devices as registry_devices


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "authority"


def admit(home: Path, certificate: str | bytes) -> Device:
    """As the server does it."""
    mark = certificate if isinstance(certificate, str) else authority.fingerprint(certificate)
    with authority.open_registry(home) as registry:
        return registry.devices.admit(mark)


def is_enrolled(home: Path, certificate: str | bytes) -> bool:
    try:
        admit(home, certificate)
    except IdentityError:
        return False
    return True


def certificates(identity: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(identity.read_bytes())


def der(identity: Path) -> bytes:
    return certificates(identity)[0].public_bytes(serialization.Encoding.DER)


def test_a_device_is_enrolled_and_revoked(home, tmp_path):
    identity = tmp_path / "laptop.pem"
    device = authority.add_device(home, "laptop", identity)
    assert list_devices(home) == [device]
    assert admit(home, der(identity)) == device
    assert is_enrolled(home, device.fingerprint) and is_enrolled(home, der(identity))
    tls.client_context(identity)

    revoke_device(home, "laptop")
    assert not is_enrolled(home, der(identity))
    with pytest.raises(IdentityError, match="'laptop' was revoked"):
        admit(home, der(identity))
    with pytest.raises(IdentityError, match="no device named"):
        revoke_device(home, "laptop")

    again = authority.add_device(home, "laptop", tmp_path / "again.pem")  # a revoked name is free again
    assert admit(home, again.fingerprint) == again
    assert not is_enrolled(home, der(identity))


def test_files_are_private(home, tmp_path):
    authority.add_device(home, "laptop", tmp_path / "laptop.pem")
    authority.server_files(home)
    files = [*home.iterdir(), tmp_path / "laptop.pem"]
    assert {f.name for f in files} == {"ca.pem", "server.pem", "registry.db", ".lock", "laptop.pem"}
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_an_identity_that_others_can_read_is_used_with_a_warning(home, tmp_path, caplog):
    identity = tmp_path / "laptop.pem"
    authority.add_device(home, "laptop", identity)
    tls.client_context(identity)
    assert not caplog.records
    identity.chmod(0o640)
    tls.client_context(identity)
    assert f"can read the identity file {identity}" in caplog.text


def test_a_directory_open_to_others_is_closed(home):
    home.mkdir(mode=0o755)
    authority.server_files(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_certificates_say_what_they_are_for(home, tmp_path):
    authority.add_device(home, "sliplm-trusted", tmp_path / "d.pem", days=30)  # no name helps a device
    device, ca = certificates(tmp_path / "d.pem")
    path, ca_pem = authority.server_files(home)
    server = x509.load_pem_x509_certificate(path.read_bytes())

    def usages(cert):
        return list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert usages(device) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert usages(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        device.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [tls.SERVER_NAME]
    for leaf in (device, server):
        leaf.verify_directly_issued_by(ca)
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert device.not_valid_after_utc - device.not_valid_before_utc < timedelta(days=31)
    assert ca_pem == authority._pem(ca)


def test_the_server_s_certificate_is_renewed_in_time(home, monkeypatch):
    path, _ = authority.server_files(home)
    first = path.read_bytes()
    assert authority.server_files(home)[0].read_bytes() == first
    later = authority._now() + timedelta(days=61)
    monkeypatch.setattr(authority, "_now", lambda: later)
    assert authority.server_files(home)[0].read_bytes() != first
    assert x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc > later + timedelta(days=80)


def test_a_signed_certificate_that_is_not_registered_is_refused(home, tmp_path):
    issue(home, tmp_path / "x.pem")
    with pytest.raises(IdentityError, match="not enrolled"):
        admit(home, der(tmp_path / "x.pem"))


def test_an_expired_device_is_refused_and_its_name_is_free(home, tmp_path, monkeypatch):
    device = authority.add_device(home, "laptop", tmp_path / "1.pem", days=1)
    later = authority._now() + timedelta(days=2)
    monkeypatch.setattr(authority, "_now", lambda: later)
    monkeypatch.setattr(registry_devices, "now", lambda: later)
    with pytest.raises(IdentityError, match="expired"):
        admit(home, device.fingerprint)
    renewed = authority.add_device(home, "laptop", tmp_path / "2.pem")
    assert revoke_device(home, "laptop").fingerprint == renewed.fingerprint
    assert "active" not in [d.state for d in list_devices(home)]


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, "é", "a\n", "a/b"])
def test_bad_names(home, tmp_path, name):
    with pytest.raises(IdentityError, match="a device name has"):
        authority.add_device(home, name, tmp_path / "x.pem")
    assert not home.exists() and not list(tmp_path.iterdir())


def test_devices_have_a_party_and_what_they_may_be(home, tmp_path):
    plain = authority.add_device(home, "laptop", tmp_path / "1.pem")
    helper = authority.add_device(home, "farm", tmp_path / "2.pem", party="Acme", edge=False, helper=True)
    both = authority.add_device(home, "idle", tmp_path / "3.pem", party="Acme", helper=True)
    assert list_devices(home) == [plain, helper, both]
    assert [(d.party, d.edge, d.helper) for d in list_devices(home)] == [
        ("laptop", True, False),
        ("Acme", False, True),
        ("Acme", True, True),
    ]


@pytest.mark.parametrize("party", ["", "a b", " a", "a\n", "a" * 65, "\N{CYRILLIC SMALL LETTER A}cme", "a/b"])
def test_bad_parties(home, tmp_path, party):
    with pytest.raises(IdentityError, match="a party name has"):
        authority.add_device(home, "x", tmp_path / "x.pem", party=party)
    assert not home.exists() and not list(tmp_path.iterdir())


def test_a_device_is_something(home, tmp_path):
    with pytest.raises(IdentityError, match="'x' has to be an edge, a helper, or both"):
        authority.add_device(home, "x", tmp_path / "x.pem", edge=False)
    assert not home.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("days", [0, -1, 826])
def test_bad_lifetimes(home, tmp_path, days):
    with pytest.raises(IdentityError, match="1 to 825 days"):
        authority.add_device(home, "x", tmp_path / "x.pem", days)


def test_nothing_is_overwritten_and_nothing_half_written(home, tmp_path):
    taken = tmp_path / "taken.pem"
    taken.write_text("precious")
    with pytest.raises(IdentityError, match=r"taken\.pem exists already"):
        authority.add_device(home, "x", taken)
    assert taken.read_text() == "precious"
    with pytest.raises(IdentityError, match="cannot be written"):
        authority.add_device(home, "x", tmp_path / "missing" / "x.pem")
    authority.add_device(home, "x", tmp_path / "x.pem")
    with pytest.raises(IdentityError, match="enrolled already"):
        authority.add_device(home, "x", tmp_path / "y.pem")
    assert len(list_devices(home)) == 1
    assert {f.name for f in tmp_path.iterdir()} == {"authority", "taken.pem", "x.pem"}


def test_no_identity_without_an_entry(home, tmp_path, monkeypatch):
    def full(*_):
        raise IdentityError("the disk is full")

    monkeypatch.setattr(registry_devices.Devices, "add", full)
    with pytest.raises(IdentityError):
        authority.add_device(home, "x", tmp_path / "x.pem")
    assert not (tmp_path / "x.pem").exists()


@pytest.mark.parametrize("content", [b"\xff" * 5000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_registry_admits_nobody(home, tmp_path, content):
    device = authority.add_device(home, "x", tmp_path / "x.pem")
    (home / "registry.db").write_bytes(content)
    for use in (
        lambda: admit(home, device.fingerprint),
        lambda: list_devices(home),
        lambda: authority.add_device(home, "y", tmp_path / "y.pem"),
    ):
        with pytest.raises(IdentityError, match="registry"):
            use()
    assert not is_enrolled(home, device.fingerprint) and not (tmp_path / "y.pem").exists()


def test_a_lost_registry_locks_devices_out(home, tmp_path):
    device = authority.add_device(home, "x", tmp_path / "x.pem")
    for file in home.glob("registry.db*"):
        file.unlink()
    with pytest.raises(IdentityError, match="not enrolled"):
        admit(home, device.fingerprint)


def test_a_lost_authority_is_not_silently_replaced(home, tmp_path):
    authority.add_device(home, "x", tmp_path / "x.pem")
    (home / "ca.pem").unlink()
    with pytest.raises(IdentityError, match="missing, although"):
        authority.server_files(home)
    (home / "ca.pem").write_text("garbage")
    with pytest.raises(IdentityError, match="damaged"):
        authority.server_files(home)


def test_concurrent_enrolments_all_count(home, tmp_path):
    threads = [
        threading.Thread(target=authority.add_device, args=(home, f"d{i}", tmp_path / f"d{i}.pem")) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(d.name for d in list_devices(home)) == sorted(f"d{i}" for i in range(12))
    cas = {authority._pem(certificates(tmp_path / f"d{i}.pem")[1]) for i in range(12)}
    assert len(cas) == 1


def test_a_busy_directory_is_not_waited_for_forever(home, tmp_path, monkeypatch):
    monkeypatch.setattr(authority, "LOCK_SECONDS", 0.1)
    with authority._locked(home), pytest.raises(IdentityError, match="another process"):
        authority.add_device(home, "x", tmp_path / "x.pem")


def test_an_unusable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="cannot be used"):
        authority.server_files(tmp_path / "file")


class TestIdentityFiles:
    def test_expired(self, home, tmp_path):
        issue(home, tmp_path / "x.pem", days=-1)
        with pytest.raises(IdentityError, match=r"expired on .*: enrol"):
            tls.client_context(tmp_path / "x.pem")

    def test_missing(self, tmp_path):
        with pytest.raises(IdentityError, match="cannot be read: No such file"):
            tls.client_context(tmp_path / "x.pem")

    def test_not_one(self, home, tmp_path):
        good = tmp_path / "good.pem"
        authority.add_device(home, "x", good)
        authority.add_device(home, "y", tmp_path / "other.pem")
        text = good.read_text()
        other = (tmp_path / "other.pem").read_text()
        end = "-----END PRIVATE KEY-----\n"
        bad = tmp_path / "bad.pem"
        for content in (
            "",
            "garbage",
            text[: len(text) // 2],
            text.partition(end)[2],
            text.partition(end)[0] + end,
            other.partition(end)[0] + end + text.partition(end)[2],
        ):
            bad.write_text(content)
            with pytest.raises(IdentityError, match=r"bad\.pem"):
                tls.client_context(bad)

    def test_encrypted_does_not_prompt(self, home, tmp_path):
        authority.add_device(home, "x", tmp_path / "x.pem")
        key = serialization.load_pem_private_key((tmp_path / "x.pem").read_bytes(), None)
        locked = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pw"),
        )
        rest = (tmp_path / "x.pem").read_text().partition("-----END PRIVATE KEY-----\n")[2]
        (tmp_path / "y.pem").write_bytes(locked + rest.encode())
        with pytest.raises(IdentityError, match="not an identity file"):
            tls.client_context(tmp_path / "y.pem")
