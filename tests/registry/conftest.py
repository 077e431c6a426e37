"""A registry on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sliplm.registry import Registry


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    if request.param == "sqlite":
        return tmp_path / "registry.db"
    server = request.getfixturevalue("postgres")
    name = f"test{abs(hash(tmp_path)):x}"
    engine = sa.create_engine(
        f"{server}/postgres".replace("postgresql", "postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    engine.dispose()
    return f"{server}/{name}"


@pytest.fixture
def registry(url: str | Path) -> Iterator[Registry]:
    with Registry(url) as opened:
        yield opened
