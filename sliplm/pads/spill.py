"""Images of pads on disk, where there is more room than in memory.

Whoever reads them reads nothing: they are encrypted (AES-256-GCM) under keys that are in this process's memory only,
one for every array, drawn from the system and used once. Nor are they of use to whoever brings the file back later,
from a backup or a snapshot of the disk: with the process its keys are gone, so no pad is ever used twice. What has been
changed, or swapped for what lay there before, is found by its tag.

They have to be secret: the edge knows Q, so from Q r it has r, and from r and the row that it was sent, the activation.

The file has no name: nothing is left of it when the process ends, however that happens.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import weakref
from bisect import bisect
from collections import deque
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sliplm.errors import BundleError
from sliplm.pads.pad import Array, Images
from sliplm.prg import fresh_key

RETRY_SECONDS = 60.0
"""So long nothing is tried after the disk was full."""

QUIET_SECONDS = 3600.0
"""So long the log does not say again that it is."""

NONCE = bytes(12)
"""Every key encrypts once, and so belongs to one place and shape: nothing else needs to be bound to them."""

_log = logging.getLogger(__name__)


class Spill:
    """Keeps images in one file without a name in `directory`; called with an array (T, M), uint32, it returns what
    gives it back, and has its room again when that was loaded or is forgotten.

    Raises BundleError if there is no such directory or nothing can be written there; when called, OSError if the disk
    is full.
    """

    def __init__(self, directory: Path | str) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - open as long as this is
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise BundleError(f"one-time pads cannot be kept in {directory}: {why}.") from None
        self._lock = threading.Lock()
        self._end = 0  # of the file
        self._holes: list[tuple[int, int]] = []  # from, to; in order, none beside another
        self._freed: deque[tuple[int, int]] = deque()  # to become holes; the collector of garbage must wait for no lock
        self._again = self._warn_again = 0.0  # when the disk may be tried, and complained about
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"Spill({self.size} bytes)"

    @property
    def size(self) -> int:
        """Bytes in use on disk."""
        with self._lock:
            self._collect()
            return self._end - sum(end - start for start, end in self._holes)

    @property
    def full(self) -> bool:
        """Whether the disk was full a moment ago: until it is worth another try."""
        return time.monotonic() < self._again

    def __call__(self, images: Array) -> Images:
        if os.getpid() != self._pid:
            raise RuntimeError("a stock of pads does not survive fork")
        key = fresh_key()
        size = images.nbytes + 16
        with self._lock:
            self._collect()
            start = self._find(size)
        try:
            plain = np.ascontiguousarray(images).data.cast("B")
            data = AESGCM(key).encrypt(NONCE, plain, None)
            _write(self._file.fileno(), data, start)
        except BaseException as error:
            self._freed.append((start, start + size))
            if isinstance(error, OSError):
                self._complain(error)
            raise
        return _Stored(self, key, start, images.shape)

    def _find(self, size: int) -> int:
        """Where there is room, in the first hole that has it or at the end."""
        for i, (start, end) in enumerate(self._holes):
            if end - start >= size:
                self._holes[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        self._end += size
        return self._end - size

    def _collect(self) -> None:
        """Make holes of what was freed, one of those that touch, and none at the end: the file ends earlier then."""
        before = self._end
        while self._freed:
            start, end = self._freed.popleft()
            i = bisect(self._holes, (start, end))
            if i < len(self._holes) and self._holes[i][0] == end:
                end = self._holes.pop(i)[1]
            if i and self._holes[i - 1][1] == start:
                start = self._holes.pop(i - 1)[0]
                i -= 1
            if end == self._end:
                self._end = start
            else:
                self._holes.insert(i, (start, end))
        if self._end < before:
            os.ftruncate(self._file.fileno(), self._end)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        self._again = now + RETRY_SECONDS
        if now >= self._warn_again:
            self._warn_again = now + QUIET_SECONDS
            _log.warning(
                "the stock of one-time pads cannot grow beyond %d MB on disk (%s); it grows again when there is room",
                self.size >> 20,
                (error.strerror or type(error).__name__).lower(),
            )


class _Stored:
    """One array on disk. Its key is forgotten with it."""

    def __init__(self, spill: Spill, key: bytes, start: int, shape: tuple[int, ...]) -> None:
        self._spill, self._key, self._start, self._shape = spill, key, start, shape
        self._size = 4 * shape[0] * shape[1] + 16
        self._free = weakref.finalize(self, spill._freed.append, (start, start + self._size))
        self._free.atexit = False

    def __repr__(self) -> str:
        return f"_Stored({self._size} bytes, <secret>)"

    def __reduce__(self) -> str:
        raise TypeError("stored pads cannot be copied")

    def load(self) -> Array:
        """The array, once. Raises OSError if it cannot be read as it was written."""
        try:
            data = _read(self._spill._file.fileno(), self._size, self._start)
            plain = AESGCM(self._key).decrypt(NONCE, data, None)
        except InvalidTag:
            raise OSError("what lies on disk is not what was written") from None
        finally:
            self._free()
        return np.frombuffer(plain, np.uint32).reshape(self._shape)


def _write(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _read(file: int, size: int, position: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        read = os.preadv(file, [view], position)
        if not read:
            raise OSError("what was written is not there any more")
        view, position = view[read:], position + read
    return data


def pieces(images: Array, room: int, size: int, spill: Spill | None) -> list[tuple[int, Array | Images, int]]:
    """`images` as (first row, rows, how many): in one piece, or, with a `spill`, `room` rows as they are and the others
    as what it gives for `size` of them at a time. It says itself when the disk is full; what it has no room for is not
    among the pieces."""
    if spill is None or room >= len(images):
        return [(0, images, len(images))] if len(images) else []
    first = max(0, room)
    kept: list[tuple[int, Array | Images, int]] = [(0, images[:first].copy(), first)] if first else []
    try:
        for begin in range(first, len(images), size):
            piece = images[begin : begin + size]
            kept.append((begin, spill(piece), len(piece)))
    except OSError:
        pass
    return kept
