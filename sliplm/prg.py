"""Keys to rows of uniform elements of F_p: what masks are made of, bit for bit at both ends (docs/protocol.md).

The keystream is AES-256 in counter mode, the counter 128 bits, big-endian, from zero. With S = ceil(K / 4) + 1, row t
of width K owns the blocks t S to t S + S - 1, which are 4 S little-endian words of 32 bits; so any rows can be had
without the others. Element j is the low 31 bits of word j. An element that equals p = 2^31 - 1 is rejected: rejected
ones, in ascending order, take the low 31 bits of the words from word K on, those that equal p left out. Given AES,
accepted elements are uniform on [0, p - 1] exactly. A row has at least four words to spare; where they do not do,
which happens with probability below 2^-80 for K < 2^16, the key is refused.
"""

from __future__ import annotations

import os
import threading

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from sliplm._core import native
from sliplm.field import P

KEY_BYTES = 32
MAX_ROW = 1 << 32
"""Rows of one key."""

_BLOCK = 16
_ZEROS = memoryview(bytes(1 << 16))


def fresh_key() -> bytes:
    """A key from the operating system."""
    return os.urandom(KEY_BYTES)


class Rows:
    """The rows of `key`, of some width, from the row `first` on. Not thread-safe.

    Raises ValueError for what is no key, no row or no width.
    """

    def __init__(self, key: bytes, first: int, width: int) -> None:
        if len(key) != KEY_BYTES or not 0 <= first < MAX_ROW or width < 1:
            raise ValueError("these are no rows of a key")
        self.next = first
        self._width = width
        self._blocks = -(-width // 4) + 1
        counter = (first * self._blocks).to_bytes(_BLOCK, "big")
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def __repr__(self) -> str:
        return "Rows(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("the rows of a key cannot be copied")

    def take(self, count: int) -> NDArray[np.uint32]:
        """The next `count` rows: (count, width), canonical. Raises ValueError for less than one row, for one beyond
        the last, and for a row with more rejections than spare words."""
        if count < 1 or self.next + count > MAX_ROW:
            raise ValueError("these are no rows of a key")
        size = _BLOCK * self._blocks * count
        room = _room(size + _BLOCK - 1)  # the cipher wants room for one block beyond what it writes
        view = room.data
        for start in range(0, size, len(_ZEROS)):
            self._cipher.update_into(_ZEROS[: size - start], view[start:])
        words = room[:size].view("<u4").reshape(count, 4 * self._blocks)
        rows: NDArray[np.uint32] = np.empty((count, self._width), np.uint32)
        if native is None:
            np.bitwise_and(words[:, : self._width], np.uint32(P), out=rows)
            rejected = rows.max() == P
        else:
            rejected = native.low_bits(words, rows)
        if rejected:
            for row, spare in zip(rows, words[:, self._width :] & np.uint32(P), strict=True):
                _replace(row, spare[spare != P])
        self.next += count
        return rows


def expand(key: bytes, first: int, count: int, width: int) -> NDArray[np.uint32]:
    """Rows `first` to `first + count - 1` of `key`: (count, width). Raises ValueError, see `Rows`."""
    return Rows(key, first, width).take(count)


def uniform(rows: int, width: int) -> NDArray[np.uint32]:
    """Fresh elements, (rows, width), whose key nobody keeps."""
    return expand(fresh_key(), 0, rows, width)


def _replace(row: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    rejected = np.flatnonzero(row == P)
    if len(rejected) > len(spare):
        raise ValueError("too many rejections in a row")
    row[rejected] = spare[: len(rejected)]


_of_thread = threading.local()


def _room(size: int) -> NDArray[np.uint8]:
    """Scratch memory of this thread, of which fresh pages would cost more than the cipher."""
    room: NDArray[np.uint8] | None = getattr(_of_thread, "room", None)
    if room is None or len(room) < size:
        room = _of_thread.room = np.empty(size, np.uint8)
    return room
