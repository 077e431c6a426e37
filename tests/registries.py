"""Devices to put into a registry, and what it holds of usage."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from sliplm.registry import Device, Registry, database
from sliplm.registry.devices import now


def device(name: str = "laptop", fingerprint: str = "aa", days: int = 1, **more: object) -> Device:
    fields = {"party": name, "edge": True, "helper": False, "added": now(), "expires": now() + timedelta(days=days)}
    return Device(name=name, fingerprint=fingerprint, **(fields | more))


def records(registry: Registry) -> list[tuple[str, int, int, str | None]]:
    t = database.usage.c
    with registry._db.read() as c:
        query = sa.select(t.request, t.prompt_tokens, t.completion_tokens, t.outcome).order_by(t.id)
        return [tuple(row) for row in c.execute(query)]
