"""The registry's database: its tables, how it is opened and brought up to date, and its errors as sentences.

SQLite by default, PostgreSQL by URL. Every write is one short transaction that takes the write lock at once, so that
two of them wait for each other instead of failing half-way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from sliplm.errors import RegistryError
from sliplm.extras import advice

HEAD = "0002"
"""The newest migration; `migrations/versions` has one file for each."""

BUSY_SECONDS = 2.0
"""A writer waits so long for another one."""

_MIGRATION_LOCK = 0x736C6970  # any number: PostgreSQL's advisory locks have no names


class UtcTime(sa.types.TypeDecorator[datetime]):
    """A time with its zone, UTC; SQLite keeps no zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite numbers rows by itself only in INTEGER columns

metadata = sa.MetaData()

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", BigId, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("party", sa.String(64), nullable=False),
    sa.Column("edge", sa.Boolean, nullable=False),
    sa.Column("helper", sa.Boolean, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
    sa.Column("added", UtcTime, nullable=False),
    sa.Column("expires", UtcTime, nullable=False),
    sa.Column("revoked", UtcTime),
    sa.Column("suspended", UtcTime),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Column("concurrent", sa.Integer),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("daily_tokens", sa.BigInteger),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("id", BigId, primary_key=True),
    sa.Column("request", sa.String(32), nullable=False, unique=True),
    sa.Column("device", sa.ForeignKey("devices.id"), nullable=False),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("updated", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("outcome", sa.String(16)),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", BigId, primary_key=True),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("device", sa.ForeignKey("devices.id")),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("text", sa.Text, nullable=False, server_default=""),
)

state = sa.Table(  # one row; its version grows with every change of a device
    "state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
)


class Database:
    """The database at `url`, or in the SQLite file at that path, its tables up to date. Safe to use from
    several threads.

    Raises RegistryError, here and in every use, when it cannot be reached, is locked, full or damaged, or was
    written by a newer version of this program.
    """

    def __init__(self, url: str | Path) -> None:
        self._url = _parse(url) if isinstance(url, str) else URL.create("sqlite", database=str(url))
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = self._create()
        # With connections of its own: writers may all be waiting for each other, and a revocation waits for nobody.
        self._reader = self._create().execution_options(
            **{"reading": True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        )
        try:
            with self.write() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Database({self.where})"

    @property
    def where(self) -> str:
        """The path, or the host and database: never a password."""
        if self.is_sqlite:
            return str(self._url.database)
        return f"{self._url.database} at {self._url.host or 'localhost'}"

    def close(self) -> None:
        self._engine.dispose()
        self._reader.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection on which every statement stands for itself."""
        with self._translated(), self._reader.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, committed at the end of the block, and rolled back if that raises."""
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.SQLAlchemyError, OSError) as error:
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise RegistryError(f"the device registry {self.where} cannot be used: {cause}") from None

    def _create(self) -> Engine:
        with self._translated():
            if self.is_sqlite:
                _create_private(Path(self._url.database or ""), self.where)
                engine = sa.create_engine(
                    self._url,
                    pool_size=1,  # opening a file is cheap: those that a crowd needed are closed after it
                    max_overflow=14,
                    pool_timeout=5,
                    connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
                )
                sa.event.listen(engine, "connect", _set_up_sqlite)
                sa.event.listen(engine, "begin", _begin_sqlite)
                return engine
            try:
                return sa.create_engine(
                    self._url,
                    pool_pre_ping=True,
                    pool_timeout=5,
                    connect_args={
                        "connect_timeout": 5,
                        "tcp_user_timeout": 5000,  # for what was sent; keepalives are for waiting for an answer
                        "keepalives_idle": 5,
                        "keepalives_interval": 2,
                        "keepalives_count": 2,
                        "options": f"-c statement_timeout=5000 -c lock_timeout={int(BUSY_SECONDS * 1000)}",
                    },
                )
            except ModuleNotFoundError:
                raise RegistryError(advice("psycopg", "a registry in PostgreSQL")) from None


def _parse(text: str) -> URL:
    try:
        url = sa.make_url(text)
        if "@" in (url.host or ""):  # the end of a password: neither errors nor `where` may show it
            raise ValueError
    except (sa.exc.ArgumentError, ValueError):
        raise RegistryError(
            "the registry's address is not a URL such as postgresql://USER@HOST/DATABASE, in which a password has %40 "
            "for @, %3A for : and %2F for /"
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or not url.database:
        raise RegistryError("a registry is at sqlite:///PATH or postgresql://USER@HOST/DATABASE")
    return url


def _create_private(path: Path, where: str) -> None:
    """Make the file, if it is missing, readable by its owner only; SQLite's side files inherit that."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise RegistryError(f"the device registry {where} cannot be used: {error.strerror}") from None


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
    cursor.execute("PRAGMA synchronous=FULL")  # a usage record survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    if not connection.get_execution_options().get("reading"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    found = None
    if sa.inspect(connection).has_table("alembic_version"):
        found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    if found == HEAD:
        return
    # Imported late: it takes a moment, and is needed once in a registry's life.
    import alembic.command
    import alembic.config
    import alembic.util

    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except alembic.util.CommandError:
        raise RegistryError("the device registry was written by another version of this program") from None
