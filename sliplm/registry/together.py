"""Writes of several threads, in one transaction.

Each by itself would wait for the disk, and SQLite lets writers poll for their turn: of sixteen that come at once the
last has it after a second, and the more there are, the sooner one gives up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from sliplm.errors import RegistryError, SlipError
from sliplm.registry.database import Database

T = TypeVar("T")

Work = Callable[[Connection], Any]

FAILED = "something that was written together with this failed"


class Together:
    """Writes to `db`. Safe to use from several threads."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: list[tuple[Work, Future[Any]]] = []

    def do(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, once that is committed; whoever comes first of those that wait commits for all of them.

        A SlipError of `work` is raised here alone, so it has to come before `work` writes. With any other, nothing is
        written of what would have been written together, and the others get a RegistryError, as for an error of the
        database. Raises RegistryError.
        """
        mine: Future[T] = Future()
        with self._lock:
            self._waiting.append((work, mine))
        with self._turn:
            if not mine.done():
                with self._lock:
                    waiting, self._waiting = self._waiting, []
                _commit(self._db, waiting, mine)
        return mine.result()


def _commit(db: Database, waiting: list[tuple[Work, Future[Any]]], mine: Future[Any]) -> None:
    results, whose = [], mine
    try:
        with db.write() as connection:
            for work, future in waiting:
                whose = future
                results.append(_result(work, connection))
            whose = mine
    except BaseException as error:  # nobody may wait for ever
        if not isinstance(error, Exception):  # an interrupt is this thread's
            whose = mine
        said = str(error) if isinstance(error, RegistryError) else FAILED
        for _, future in waiting:
            future.set_exception(error if future is whose else RegistryError(said))
        return
    for (_, future), (result, failure) in zip(waiting, results, strict=True):
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)


def _result(work: Work, connection: Connection) -> tuple[Any, SlipError | None]:
    try:
        return work(connection), None
    except SlipError as error:
        return None, error
