"""What a device may be, and whose it is. Whoever was enrolled before is an edge and a party of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # The defaults fail closed: a row that some other program writes is of no party and may be nothing.
    op.add_column("devices", sa.Column("party", sa.String(64), nullable=False, server_default=""))
    op.add_column("devices", sa.Column("edge", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("devices", sa.Column("helper", sa.Boolean, nullable=False, server_default=sa.false()))
    devices = sa.table("devices", sa.column("name"), sa.column("party"), sa.column("edge"))
    op.execute(sa.update(devices).values(party=devices.c.name, edge=sa.true()))
