"""Usage records: what every request used, written once, whatever happens to the server.

A record is opened before a request may generate, its tokens are brought up to date while it runs, and it is closed at
its end. What a killed server left open is closed as `interrupted`, with the tokens of its last update.

Outcomes: `stop` and `length` as the customer sees them; `cancelled` by the customer; `interrupted` by the end of either
side's process or connection; `unverified` answers; `refused` by the owner's rules; `invalid` requests; `limited` and
`busy`: not now; `failed`: a fault of the trusted side.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sliplm.errors import LinkError
from sliplm.registry import database
from sliplm.registry.database import Database
from sliplm.registry.devices import Device, _device, now
from sliplm.registry.together import Together

INTERRUPTED = LinkError.outcome

STALE_SECONDS = 10.0
"""A record that nobody has updated for so long belongs to a server that is gone: servers update every second, and stop
generating when they could not for five (`serve/meter.py`)."""

_table = database.usage
_tokens = _table.c.prompt_tokens + _table.c.completion_tokens


class Totals(NamedTuple):
    """Sums over usage records."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class Used(NamedTuple):
    """What a device has used on a day, which is named by its midnight UTC."""

    day: datetime
    tokens: int


class Tokens(NamedTuple):
    """The state of one request."""

    request: str
    prompt_tokens: int
    completion_tokens: int


class Usage:
    """The usage records in `db`."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._writes = Together(db)

    def begin(self, request: str, device: Device) -> Used:
        """Open the record of `request`, an id that no other request has. Returns what the device's other requests have
        used today.

        Raises IdentityError if the device is no edge or may not connect any more, RegistryError if nothing could be
        written: the request must not run then.
        """
        start = now()

        def write(c: Connection) -> Used:
            row = c.execute(sa.select(database.devices).where(database.devices.c.id == device.id)).one()
            found = _device(row)
            found.require_active()
            found.require_edge()
            day = midnight(start)
            today = (_table.c.device == device.id, _table.c.started >= day)
            used: int | None = c.execute(sa.select(sa.func.sum(_tokens)).where(*today)).scalar()
            c.execute(sa.insert(_table).values(request=request, device=device.id, started=start, updated=start))
            return Used(day, int(used or 0))

        return self._writes.do(write)

    def update(self, running: Sequence[Tokens]) -> None:
        """Note the tokens of requests that are running, all in one transaction."""
        if not running:
            return
        change = (
            sa.update(_table)
            .where(_table.c.request == sa.bindparam("key"), _table.c.finished.is_(None))
            .values(prompt_tokens=sa.bindparam("p"), completion_tokens=sa.bindparam("c"), updated=now())
        )
        rows = [{"key": r.request, "p": r.prompt_tokens, "c": r.completion_tokens} for r in running]
        self._writes.do(lambda c: c.execute(change, rows))

    def finish(self, tokens: Tokens, outcome: str) -> None:
        """Close a record. A second time changes nothing, so that it can be repeated when it may have failed; but the
        request's own server knows better than whoever took it for interrupted."""
        change = (
            sa.update(_table)
            .where(
                _table.c.request == tokens.request,
                sa.or_(_table.c.finished.is_(None), _table.c.outcome == INTERRUPTED),
            )
            .values(
                prompt_tokens=tokens.prompt_tokens,
                completion_tokens=tokens.completion_tokens,
                finished=now(),
                updated=now(),
                outcome=outcome,
            )
        )
        self._writes.do(lambda c: c.execute(change))

    def sweep(self, stale: float = STALE_SECONDS) -> int:
        """Close the records that a killed server left open; how many there were."""
        change = (
            sa.update(_table)
            .where(_table.c.finished.is_(None), _table.c.updated < now() - timedelta(seconds=stale))
            .values(finished=_table.c.updated, outcome=INTERRUPTED)
        )
        return self._writes.do(lambda c: int(c.execute(change).rowcount))

    def totals(self, device: Device, since: datetime | None = None) -> Totals:
        """What the device has used, since then or ever."""
        where = [_table.c.device == device.id]
        if since is not None:
            where.append(_table.c.started >= since)
        sums = [
            sa.func.coalesce(sa.func.sum(column), 0) for column in (_table.c.prompt_tokens, _table.c.completion_tokens)
        ]
        with self._db.read() as c:
            row = c.execute(sa.select(sa.func.count(), *sums).where(*where)).one()
        return Totals(*map(int, row))


def midnight(time: datetime) -> datetime:
    """The last midnight UTC."""
    return time.replace(hour=0, minute=0, second=0, microsecond=0)
