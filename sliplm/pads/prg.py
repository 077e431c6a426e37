"""A cryptographic stream of exactly uniform elements of F_p."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from sliplm.field import P

_CHUNK = 1 << 20  # words drawn at a time


class Stream:
    """AES-256 in counter mode under a key from the operating system that never leaves this object.

    The low 31 bits of each keystream word are uniform on [0, 2^31 - 1]; the single value p = 2^31 - 1 is rejected and
    drawn again, so elements are uniform on [0, p - 1] exactly (given AES-CTR). Not thread-safe.
    """

    __slots__ = ("_cipher", "_pid", "_zeros")

    def __init__(self) -> None:
        self._cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(4 * _CHUNK)
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return "Stream(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("a stream of pads cannot be copied")

    def words(self, count: int) -> NDArray[np.uint32]:
        """The next `count` raw 32-bit words of the keystream."""
        if os.getpid() != self._pid:
            raise RuntimeError("a stream of pads does not survive fork: the child would repeat its parent's pads")
        # update_into wants room for one block beyond what it writes.
        buffer = bytearray(4 * count + 15)
        view = memoryview(buffer)
        for start in range(0, count, _CHUNK):
            size = 4 * min(_CHUNK, count - start)
            self._cipher.update_into(self._zeros[:size], view[4 * start :])
        return np.frombuffer(buffer, np.uint32, count)

    def elements(self, *shape: int) -> NDArray[np.uint32]:
        """Fresh uniform elements of F_p, uint32, of the given shape."""
        values = self.words(int(np.prod(shape))) & np.uint32(P)
        while len(again := np.flatnonzero(values == P)):
            values[again] = self.words(len(again)) & np.uint32(P)
        return values.reshape(shape)
