"""The registry, on SQLite and on a real PostgreSQL: devices, usage records that are written once, migrations."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import alembic.command
import alembic.config
import alembic.script
import pytest
import sqlalchemy as sa
from registries import device, records

from sliplm import registry as registry_package
from sliplm.errors import IdentityError, RegistryError
from sliplm.pads.parties import may_use
from sliplm.registry import Limits, Registry, database
from sliplm.registry.devices import now
from sliplm.registry.usage import Tokens, midnight


def test_devices(registry: Registry) -> None:
    devices = registry.devices
    one = devices.add(device(limits=Limits(concurrent=2)))
    assert devices.all() == [one] and devices.admit("aa") == one and devices.get("laptop") == one
    assert one.expires.tzinfo is not None and one.limits == Limits(2, None, None)
    version = devices.version()
    with pytest.raises(IdentityError, match="enrolled already"):
        devices.add(device(fingerprint="bb"))
    devices.suspend(one, "it lied")
    assert devices.version() > version
    assert (devices.get("laptop").state, devices.get("laptop").reason) == ("suspended", "it lied")
    with pytest.raises(IdentityError, match="suspended"):
        devices.admit("aa")
    devices.resume("laptop")
    assert devices.admit("aa").reason == ""
    with pytest.raises(IdentityError, match="not suspended"):
        devices.resume("laptop")
    assert devices.limit("laptop", Limits(daily_tokens=5)).limits == Limits(None, None, 5)
    devices.revoke("laptop")
    with pytest.raises(IdentityError, match="revoked"):
        devices.admit("aa")
    with pytest.raises(IdentityError, match="not suspended"):
        devices.resume("laptop")
    again = devices.add(device(fingerprint="bb"))
    assert devices.get("laptop") == again
    kinds = [e.kind for e in devices.events(one)]
    assert kinds == ["revoked", "limited", "resumed", "suspended", "added"]
    with pytest.raises(IdentityError, match="not enrolled"):
        devices.admit("cc")
    with pytest.raises(IdentityError, match="no device named"):
        devices.get("nobody")


def test_an_edge_is_no_helper_and_a_helper_no_edge(registry: Registry) -> None:
    devices = registry.devices
    edge = devices.add(device("edge", "aa"))
    helper = devices.add(device("helper", "bb", party="Acme", edge=False, helper=True))
    both = devices.add(device("both", "cc", party="Acme", helper=True))
    assert [devices.admit(f) for f in ("aa", "bb", "cc")] == [edge, helper, both] == devices.all()
    assert [d.roles for d in devices.all()] == ["edge", "helper", "edge and helper"]
    assert [d.party for d in devices.all()] == ["edge", "Acme", "Acme"]
    for one in (edge, both):
        one.require_edge()
        registry.usage.begin(one.name, one)
    for one in (helper, both):
        one.require_helper()
    with pytest.raises(
        IdentityError, match="'helper' is enrolled as a helper and cannot be an edge: enrol it with --edge"
    ):
        helper.require_edge()
    with pytest.raises(
        IdentityError, match="'edge' is enrolled as an edge and cannot be a helper: enrol it with --helper"
    ):
        edge.require_helper()
    with pytest.raises(IdentityError, match="cannot be an edge"):
        registry.usage.begin("r", helper)
    assert [r[0] for r in records(registry)] == ["edge", "both"]


def test_a_helper_is_limited_suspended_resumed_and_revoked_as_an_edge_is(registry: Registry) -> None:
    devices = registry.devices
    helper = devices.add(device("helper", party="Acme", edge=False, helper=True))
    assert devices.limit("helper", Limits(concurrent=2)).limits == Limits(2, None, None)
    devices.suspend(helper, "it lied")
    with pytest.raises(IdentityError, match="suspended"):
        devices.admit("aa")
    assert devices.resume("helper") == devices.admit("aa")
    devices.admit("aa").require_helper()
    assert (devices.admit("aa").roles, devices.admit("aa").party) == ("helper", "Acme")
    devices.revoke("helper")
    with pytest.raises(IdentityError, match="revoked"):
        devices.admit("aa")
    again = devices.add(device("helper", "bb"))  # as something else, under a certificate of its own
    assert (devices.get("helper").roles, devices.get("helper").party) == ("edge", "helper") and again.id != helper.id


def test_usage_is_recorded_once(registry: Registry) -> None:
    one = registry.devices.add(device())
    usage = registry.usage
    assert usage.begin("r1", one) == (midnight(now()), 0)
    usage.update([Tokens("r1", 10, 5)])
    assert usage.begin("r2", one).tokens == 15
    usage.finish(Tokens("r1", 10, 7), "stop")
    usage.finish(Tokens("r1", 10, 7), "stop")  # repeated, as after a doubtful answer of the database
    usage.finish(Tokens("r1", 99, 99), "length")  # and whatever else comes late
    usage.update([Tokens("r1", 99, 99)])
    assert records(registry) == [("r1", 10, 7, "stop"), ("r2", 0, 0, None)]
    with pytest.raises(RegistryError):
        usage.begin("r1", one)
    assert usage.totals(one) == (2, 10, 7) == usage.totals(one, midnight(now()))
    assert usage.totals(one, now() + timedelta(days=1)) == (0, 0, 0)


def test_what_a_killed_server_left_open_is_closed(registry: Registry) -> None:
    one = registry.devices.add(device())
    for name in ("r1", "r2"):
        registry.usage.begin(name, one)
    registry.usage.update([Tokens("r1", 10, 5)])
    assert registry.usage.sweep() == 0  # it may be alive
    assert registry.usage.sweep(stale=0) == 2 and registry.usage.sweep(stale=0) == 0
    registry.usage.finish(Tokens("r2", 3, 4), "stop")  # it was: its own server knows better
    assert records(registry) == [("r1", 10, 5, "interrupted"), ("r2", 3, 4, "stop")]


def test_a_device_that_may_not_connect_begins_nothing(registry: Registry) -> None:
    one = registry.devices.add(device())
    registry.devices.revoke("laptop")
    with pytest.raises(IdentityError, match="revoked"):
        registry.usage.begin("r1", one)
    assert records(registry) == []


@pytest.mark.slow
def test_two_processes_create_it_at_once(url: str | Path) -> None:
    where = f"sqlite:///{url}" if isinstance(url, Path) else url
    code = "import sys; from sliplm.registry import Registry; print(Registry(sys.argv[1]).devices.version())"
    both = [subprocess.Popen([sys.executable, "-c", code, where], stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate(timeout=120)[0] for p in both] == [b"0\n"] * 2


def test_the_migrations_make_the_tables_that_are_used(registry: Registry) -> None:
    found = sa.MetaData()
    with registry._db.read() as c:
        found.reflect(c)
    for table in database.metadata.sorted_tables:
        real = found.tables[table.name].columns
        assert {(k.name, k.nullable) for k in table.columns} == {(k.name, k.nullable) for k in real}
    scripts = alembic.script.ScriptDirectory(str(Path(registry_package.__file__).parent / "migrations"))
    assert scripts.get_heads() == [database.HEAD]


def test_a_registry_of_the_first_version_is_brought_up_to_date(
    url: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that is in it: devices and their states, records and events that refer to them."""
    upgrade = alembic.command.upgrade
    with monkeypatch.context() as first:
        first.setattr(alembic.command, "upgrade", lambda config, _: upgrade(config, "0001"))
        old = database.Database(url)
    columns = "INSERT INTO devices (name, fingerprint, added, expires, revoked, daily_tokens) VALUES "
    times = "'2026-01-01 00:00:00+00:00', '2099-01-01 00:00:00+00:00'"
    with old.write() as c:
        c.exec_driver_sql(f"{columns}('laptop', 'aa', {times}, NULL, 5), ('Old.1', 'bb', {times}, '2026-02-01', NULL)")
        c.exec_driver_sql(f"INSERT INTO usage (request, device, started, updated) VALUES ('r1', 1, {times})")
        c.exec_driver_sql("INSERT INTO events (time, device, kind) VALUES ('2026-01-01 00:00:00+00:00', 2, 'added')")
    old.close()
    with Registry(url) as registry:
        laptop, gone = registry.devices.all()
        assert [(d.name, d.party, d.roles) for d in (laptop, gone)] == [
            ("laptop", "laptop", "edge"),
            ("Old.1", "Old.1", "edge"),
        ]
        assert registry.devices.admit("aa") == laptop and laptop.limits == Limits(daily_tokens=5)
        assert gone.state == "revoked" and [e.kind for e in registry.devices.events(gone)] == ["added"]
        assert records(registry) == [("r1", 0, 0, None)]
        registry.devices.add(device("new", "cc", edge=False, helper=True)).require_helper()
    with Registry(url) as registry:  # and once only
        assert [d.roles for d in registry.devices.all()] == ["edge", "edge", "helper"]


def test_a_device_that_another_program_wrote_is_of_no_party_and_may_be_nothing(registry: Registry) -> None:
    with registry._db.write() as c:
        c.exec_driver_sql(
            "INSERT INTO devices (name, fingerprint, added, expires) "
            "VALUES ('x', 'aa', '2026-01-01 00:00:00+00:00', '2099-01-01 00:00:00+00:00')"
        )
    found = registry.devices.admit("aa")
    assert (found.party, found.roles) == ("", "")
    for require in (found.require_edge, found.require_helper):
        with pytest.raises(IdentityError):
            require()
    assert not may_use(frozenset({found.party}), "acme") and not may_use(frozenset({"acme"}), found.party)


def test_a_newer_registry_is_refused(registry: Registry, url: str | Path) -> None:
    with registry._db.write() as c:
        c.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RegistryError, match="another version of this program"):
        Registry(url)


@pytest.mark.parametrize("text", ["nonsense", "mysql://x/y", "postgresql://host", "sqlite://", ""])
def test_bad_urls(text: str) -> None:
    with pytest.raises(RegistryError):
        Registry(text)


@pytest.mark.parametrize("password", ["hunter2@x:y", "x@hunter2", "x:y@hunter2:z"])
def test_a_password_that_is_not_escaped_is_not_shown(password: str) -> None:
    with pytest.raises(RegistryError, match="in which a password has %40 for @") as caught:
        Registry(f"postgresql://me:{password}@127.0.0.1/devices")
    assert "hunter2" not in str(caught.value)


def test_an_unreachable_server_gets_a_sentence_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RegistryError, match="devices at 127") as caught:
        Registry(f"postgresql://me:hunter2@127.0.0.1:{port}/devices")
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_postgresql_server_that_is_gone_is_noticed_while_its_answer_is_awaited(postgres: str) -> None:
    with Registry(f"{postgres}/postgres") as registry, registry._db.read() as c:
        parameters = c.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
    wanted = {"keepalives_idle": "5", "keepalives_interval": "2", "keepalives_count": "2", "tcp_user_timeout": "5000"}
    assert wanted.items() <= parameters.items()


def test_a_locked_registry_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with Registry(tmp_path / "r.db") as registry:
        one = registry.devices.add(device())
        other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match="locked"):
            registry.usage.begin("r1", one)
        assert registry.devices.admit("aa") == one  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        registry.usage.begin("r1", one)


def test_readers_do_not_wait_for_a_crowd_of_writers(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.db") as registry:
        one = registry.devices.add(device())
        other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        def use(name: str) -> None:
            with contextlib.suppress(RegistryError):
                registry.usage.begin(name, one)

        crowd = [threading.Thread(target=use, args=(f"r{i}",)) for i in range(20)]  # more than have a connection
        for thread in crowd:
            thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert registry.devices.version() and time.monotonic() - started < 0.5
        other.execute("ROLLBACK")
        other.close()
        for thread in crowd:
            thread.join(60)


def test_a_full_disk_is_an_error_and_leaves_the_registry_whole(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.db") as registry:
        one = registry.devices.add(device())

        @sa.event.listens_for(registry._db._engine, "connect")
        def small(connection: sqlite3.Connection, _: object) -> None:
            connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")

        registry._db._engine.dispose()  # connect anew
        with pytest.raises(RegistryError, match="full"):
            for i in range(1000):
                registry.usage.begin(f"{i:032}", one)
    with Registry(tmp_path / "r.db") as registry:
        assert registry.devices.admit("aa") == one and registry.usage.totals(one).requests == i


def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Registry(tmp_path / "r.db") as registry:
            registry.devices.add(device())
            assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o600}
    finally:
        os.umask(old)


@pytest.mark.parametrize("value", [-1, 1 << 31])
def test_senseless_limits(value: int) -> None:
    with pytest.raises(IdentityError, match="a limit is"):
        Limits(daily_tokens=value)
