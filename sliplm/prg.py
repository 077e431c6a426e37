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

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from sliplm.field import P

KEY_BYTES = 32
MAX_ROW = 1 << 32
"""Rows of one key."""

_ZEROS = bytes(1 << 20)


def fresh_key() -> bytes:
    """A key from the operating system."""
    return os.urandom(KEY_BYTES)


def expand(key: bytes, first: int, count: int, width: int) -> NDArray[np.uint32]:
    """Rows `first` to `first + count - 1` of `key`: (count, width), canonical.

    Raises ValueError for what is no key, no rows or no width, and for a row with more rejections than spare words.
    """
    if len(key) != KEY_BYTES or first < 0 or count < 1 or first + count > MAX_ROW or width < 1:
        raise ValueError("these are no rows of a key")
    blocks = -(-width // 4) + 1
    cipher = Cipher(algorithms.AES256(key), modes.CTR((first * blocks).to_bytes(16, "big"))).encryptor()
    size = 16 * blocks * count
    buffer = bytearray(size + 15)  # update_into wants room for one block beyond what it writes
    view = memoryview(buffer)
    for start in range(0, size, len(_ZEROS)):
        cipher.update_into(_ZEROS[: size - start], view[start:])
    words = np.frombuffer(buffer, "<u4", size // 4).reshape(count, 4 * blocks)
    rows: NDArray[np.uint32] = words[:, :width] & np.uint32(P)
    if rows.max() == P:
        for row, spare in zip(rows, words[:, width:] & np.uint32(P), strict=True):
            _replace(row, spare[spare != P])
    return rows


def uniform(rows: int, width: int) -> NDArray[np.uint32]:
    """Fresh elements, (rows, width), whose key nobody keeps."""
    return expand(fresh_key(), 0, rows, width)


def _replace(row: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    rejected = np.flatnonzero(row == P)
    if len(rejected) > len(spare):
        raise ValueError("too many rejections in a row")
    row[rejected] = spare[: len(rejected)]
