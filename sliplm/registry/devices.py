"""The devices of a registry: who is enrolled, in which state, under which limits, and what happened to them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sliplm.errors import IdentityError
from sliplm.registry import database
from sliplm.registry.database import Database


class Limits(msgspec.Struct, frozen=True):
    """What one device may use; None leaves it to the server's default, 0 means without limit.

    `concurrent` requests generate at once, further ones wait. Tokens are those of prompts and answers together;
    `daily_tokens` count from midnight UTC.
    """

    concurrent: int | None = None
    tokens_per_minute: int | None = None
    daily_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 31:
                raise IdentityError(f"a limit is a number from 0, for none, to 2147483647, not {value}")

    def over(self, defaults: Limits) -> Limits:
        """These limits, and where they say nothing the defaults."""
        return Limits(*(d if v is None else v for v, d in zip(_astuple(self), _astuple(defaults), strict=True)))


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate that was handed out. `fingerprint` is the SHA-256 of its DER form, in hex; `id` the registry's
    number for it; `reason` says why it was suspended.

    An `edge` may open WORK and REQUEST connections, a `helper` may make pads for edges of other parties. The `party`
    has the device under its control, and may pool what all of its devices see. None of the three ever changes.
    """

    id: int = 0
    name: str
    party: str
    edge: bool
    helper: bool
    fingerprint: str
    added: datetime
    expires: datetime
    revoked: datetime | None = None
    suspended: datetime | None = None
    reason: str = ""
    limits: Limits = Limits()

    @property
    def state(self) -> str:
        """active, suspended, revoked or expired."""
        if self.revoked is not None:
            return "revoked"
        if now() >= self.expires:
            return "expired"
        return "active" if self.suspended is None else "suspended"

    @property
    def roles(self) -> str:
        """What it may be, in words: edge, helper, or "edge and helper"."""
        return " and ".join(role for role, may in (("edge", self.edge), ("helper", self.helper)) if may)

    def require_edge(self) -> None:
        """Raises IdentityError unless this device may be an edge."""
        if not self.edge:
            sentence = f"the device {self.name!r} is enrolled as a helper and cannot be an edge: enrol it with --edge"
            raise IdentityError(sentence)

    def require_helper(self) -> None:
        """Raises IdentityError unless this device may make pads."""
        if not self.helper:
            sentence = f"the device {self.name!r} is enrolled as an edge and cannot be a helper: enrol it with --helper"
            raise IdentityError(sentence)

    def require_active(self) -> None:
        """Raises IdentityError, saying why not, unless this device may connect."""
        match self.state:
            case "revoked":
                raise IdentityError(f"the device {self.name!r} was revoked")
            case "expired":
                raise IdentityError(f"the certificate of device {self.name!r} has expired")
            case "suspended":
                raise IdentityError(f"the device {self.name!r} is suspended: ask the owner of the model")


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a device."""

    time: datetime
    kind: str
    text: str


class Devices:
    """The devices in `db`. Every change raises the version, which is cheap to watch."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def version(self) -> int:
        """A number that grows with every change of any device."""
        with self._db.read() as c:
            return int(c.execute(sa.select(database.state.c.version)).scalar_one())

    def all(self) -> list[Device]:
        """Every certificate ever handed out, oldest first."""
        with self._db.read() as c:
            return [_device(row) for row in c.execute(sa.select(database.devices).order_by(database.devices.c.id))]

    def get(self, name: str) -> Device:
        """The device of this name: the one that is not revoked, or else the last that was. Raises IdentityError if
        there never was one."""
        table = database.devices
        order = (table.c.revoked.is_not(None), table.c.id.desc())
        with self._db.read() as c:
            row = c.execute(sa.select(table).where(table.c.name == name).order_by(*order)).first()
        if row is None:
            raise IdentityError(f"no device named {name!r} is enrolled")
        return _device(row)

    def admit(self, fingerprint: str) -> Device:
        """The enrolled device with this certificate. Raises IdentityError, saying why not, and RegistryError if
        nobody can tell."""
        table = database.devices
        with self._db.read() as c:
            row = c.execute(sa.select(table).where(table.c.fingerprint == fingerprint)).first()
        if row is None:
            raise IdentityError("this device is not enrolled with this trusted side")
        device = _device(row)
        device.require_active()
        return device

    def add(self, device: Device) -> Device:
        """Enrol `device`, whose `id` is chosen here. Raises IdentityError if its name is in use."""
        with self._db.write() as c:
            _touch(c)  # takes the lock, so that no two enrolments see a name as free
            self._require_free(c, device.name)
            values = {f: getattr(device, f) for f in device.__struct_fields__ if f not in ("id", "limits")}
            limits = {f: getattr(device.limits, f) for f in device.limits.__struct_fields__}
            statement = sa.insert(database.devices).values(**values, **limits).returning(database.devices.c.id)
            added = msgspec.structs.replace(device, id=int(c.execute(statement).scalar_one()))
            _record(c, added.id, "added", device.added)
            return added

    def _require_free(self, c: Connection, name: str) -> None:
        table = database.devices
        rows = c.execute(sa.select(table).where(table.c.name == name, table.c.revoked.is_(None)))
        if any(_device(row).state != "expired" for row in rows):
            raise IdentityError(f"a device named {name!r} is enrolled already: revoke it or choose another name")

    def revoke(self, name: str) -> Device:
        """Shut `name` out for good. Raises IdentityError if no such device is enrolled."""
        table = database.devices
        with self._db.write() as c:
            _touch(c)
            rows = c.execute(sa.select(table).where(table.c.name == name, table.c.revoked.is_(None))).all()
            if not rows:
                raise IdentityError(f"no device named {name!r} is enrolled")
            for row in rows:  # more than one if an expired certificate was followed by a new one
                c.execute(sa.update(table).where(table.c.id == row.id).values(revoked=now()))
                _record(c, row.id, "revoked")
        return self.get(name)

    def suspend(self, device: Device, reason: str) -> None:
        """Shut `device` out until it is resumed."""
        table = database.devices
        with self._db.write() as c:
            _touch(c)
            c.execute(sa.update(table).where(table.c.id == device.id).values(suspended=now(), reason=reason))
            _record(c, device.id, "suspended", text=reason)

    def resume(self, name: str) -> Device:
        """Lift a suspension. Raises IdentityError if there is none."""
        device = self.get(name)
        if device.suspended is None or device.revoked is not None:
            raise IdentityError(f"the device {name!r} is not suspended")
        table = database.devices
        with self._db.write() as c:
            _touch(c)
            c.execute(sa.update(table).where(table.c.id == device.id).values(suspended=None, reason=""))
            _record(c, device.id, "resumed")
        return self.get(name)

    def limit(self, name: str, limits: Limits) -> Device:
        """Give the device these limits, in place of all it had."""
        device = self.get(name)
        device_limits = {f: getattr(limits, f) for f in limits.__struct_fields__}
        table = database.devices
        with self._db.write() as c:
            _touch(c)
            c.execute(sa.update(table).where(table.c.id == device.id).values(**device_limits))
            _record(c, device.id, "limited", text=" ".join(f"{k}={v}" for k, v in device_limits.items()))
        return self.get(name)

    def events(self, device: Device, count: int = 20) -> list[Event]:
        """The last `count` things that happened to `device`, newest first."""
        table = database.events
        query = sa.select(table).where(table.c.device == device.id).order_by(table.c.id.desc()).limit(count)
        with self._db.read() as c:
            return [Event(row.time, row.kind, row.text) for row in c.execute(query)]


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(timezone.utc)


def _touch(c: Connection) -> None:
    c.execute(sa.update(database.state).values(version=database.state.c.version + 1))


def _record(c: Connection, device: int, kind: str, time: datetime | None = None, text: str = "") -> None:
    c.execute(sa.insert(database.events).values(device=device, kind=kind, time=time or now(), text=text))


def _device(row: Any) -> Device:
    fields = row._asdict()
    limits = Limits(*(fields.pop(name) for name in Limits.__struct_fields__))
    return Device(**fields, limits=limits)


def _astuple(limits: Limits) -> tuple[int | None, ...]:
    return msgspec.structs.astuple(limits)
