"""Things that take long to make, and are made when the first request needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sliplm.errors import RequestError

T = TypeVar("T")


class Once(Generic[T]):
    """What `make` returns. It is called once, however many threads ask at a time; a RequestError of its is remembered,
    too.

    Attributes:
        made: what it made; None before, and after a RequestError.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.made: T | None = None
        self._make, self._lock = make, threading.Lock()
        self._refusal: str | None = None

    def __call__(self) -> T:
        """Raises whatever `make` does."""
        with self._lock:
            if self._refusal is not None:
                raise RequestError(self._refusal)
            if self.made is None:
                try:
                    self.made = self._make()
                except RequestError as error:
                    self._refusal = str(error)
                    raise
            return self.made
