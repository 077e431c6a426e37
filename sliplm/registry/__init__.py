"""Who may connect, within which limits, and what was used: the trusted side's registry.

`Registry(url)` opens it; `authority.open_registry` finds the one of an authority.
"""

from __future__ import annotations

from pathlib import Path

from sliplm.registry.database import Database
from sliplm.registry.devices import Device, Devices, Limits
from sliplm.registry.usage import Usage

__all__ = ["Device", "Limits", "Registry"]


class Registry:
    """The registry at `url` (`postgresql://...`, `sqlite:///...`, or the path of an SQLite file), created or brought up
    to date if need be.

    Attributes:
        devices: enrolment, states, limits and events.
        usage: the usage records.

    Raises RegistryError when it cannot be used, here and in every method.
    """

    def __init__(self, url: str | Path) -> None:
        self._db = Database(url)
        self.devices = Devices(self._db)
        self.usage = Usage(self._db)

    def __repr__(self) -> str:
        return f"Registry({self._db.where})"

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
