"""Devices, usage records and events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_big_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_time = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("id", _big_id, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, index=True),
        sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
        sa.Column("added", _time, nullable=False),
        sa.Column("expires", _time, nullable=False),
        sa.Column("revoked", _time),
        sa.Column("suspended", _time),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("concurrent", sa.Integer),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("daily_tokens", sa.BigInteger),
    )
    op.create_table(
        "usage",
        sa.Column("id", _big_id, primary_key=True),
        sa.Column("request", sa.String(32), nullable=False, unique=True),
        sa.Column("device", _big_id, sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("started", _time, nullable=False),
        sa.Column("updated", _time, nullable=False),
        sa.Column("finished", _time),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("outcome", sa.String(16)),
    )
    op.create_index("usage_of_device", "usage", ["device", "started"])
    unfinished = sa.text("finished IS NULL")
    op.create_index("usage_open", "usage", ["updated"], sqlite_where=unfinished, postgresql_where=unfinished)
    op.create_table(
        "events",
        sa.Column("id", _big_id, primary_key=True),
        sa.Column("time", _time, nullable=False),
        sa.Column("device", _big_id, sa.ForeignKey("devices.id"), index=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("text", sa.Text, nullable=False, server_default=""),
    )
    state = op.create_table(
        "state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(state, [{"id": 1, "version": 0}])
