"""The extension's functions and classes (`module.cpp`). Arrays are C-contiguous and on the CPU, and are not converted.

(T, N) and the like are shapes; where an array is named `out`, `masked` or `inv_c` it is written to. `isa` holds a
function to one instruction set, one of `isas()`; "" is the best. Whatever does not fit raises TypeError or ValueError.
"""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import numpy as np

_T = TypeVar("_T", bound=np.generic)
Vector: TypeAlias = np.ndarray[tuple[int], np.dtype[_T]]
Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[_T]]
Cube: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[_T]]
Four: TypeAlias = np.ndarray[tuple[int, int, int, int], np.dtype[_T]]
Five: TypeAlias = np.ndarray[tuple[int, int, int, int, int], np.dtype[_T]]

Blinding: TypeAlias = tuple[Matrix[np.int32], Cube[np.float32], Vector[np.float32]]
"""Permutations (4, N), turns (4, 2, N / 2), diagonal (N,)."""

def isas() -> list[str]:
    """The instruction sets that this machine can run, best first."""

def threads() -> int:
    """The cores that this process may run on, or fewer: see `limit_threads`."""

def limit_threads(n: int) -> None:
    """From now on nothing here uses more than n threads of this process; 0 lifts the limit."""

class PackedMatrix:
    """An integer matrix (M, K), repacked in memory of its own."""

    def __init__(self, q: Matrix[np.int8], isa: str = "") -> None: ...
    def product(self, x: Matrix[np.uint32], out: Matrix[np.uint32], threads: int = 0) -> None:
        """out (T, M) = q x_t mod p for x (T, K), any 32-bit values. `threads` = 0 uses every core."""
    @property
    def nbytes(self) -> int: ...

def is_canonical(x: Vector[np.uint32]) -> bool:
    """Whether every element of `x` (N,) is below p."""

def low_bits(words: Matrix[np.uint32], out: Matrix[np.uint32], isa: str = "") -> bool:
    """out (T, K) = the low 31 bits of the first K of words (T, K or more); whether any of them is p."""

def project(u: Matrix[np.uint32], q: Matrix[np.int8], out: Matrix[np.uint32], isa: str = "") -> None:
    """out (C, K) = u (C, M) q (M, K) mod p."""

def encode(
    x: Matrix[np.float32],
    r: Matrix[np.uint32],
    length: float,
    blinding: Blinding | None,
    uq: Matrix[np.uint32],
    masked: Matrix[np.uint32],
    inv_c: Vector[np.float64],
    expected: Matrix[np.uint32],
    isa: str = "",
) -> bool:
    """masked (T, K) = x_q + r mod p and inv_c (T,) = 1 / c, where x_q = round(c v), v is x (T, K) blinded and
    c |v| = `length`; expected (T, C) = uq (C, K) x_q mod p.

    False, and no meaningful result, if x is not finite.
    """

def verify(
    u: Matrix[np.uint32],
    uq: Matrix[np.uint32],
    masked: Matrix[np.uint32],
    answer: Matrix[np.uint32],
    isa: str = "",
) -> bool:
    """Whether `answer` (T, M) is canonical and u (C, M) answer_t = uq (C, K) masked_t mod p for every t."""

def decode(
    answer: Matrix[np.uint32],
    image: Matrix[np.uint32],
    scales: Matrix[np.float32],
    inv_c: Vector[np.float64],
    blinding: Blinding | None,
    u: Matrix[np.uint32],
    expected: Matrix[np.uint32],
    out: Matrix[np.float32],
    isa: str = "",
) -> bool:
    """Add z = answer - image mod p (T, planes * N), scaled by `scales` (planes, N) and inv_c (T,), unblinded, to out
    (T, N). Whether answer and image are canonical and u (C, planes * N) z_t = expected_t mod p for every t.
    """

class LowRank32:
    """A group's A (B x) + b. Keeps copies of what it is given.

    bt (K, W): the members' B, transposed, side by side, then zeros up to a multiple of 16; at: each member's A,
    transposed; bias: each member's, or None.
    """

    def __init__(
        self, bt: Matrix[np.float32], at: Sequence[Matrix[np.float32]], bias: Sequence[Vector[np.float32] | None]
    ) -> None: ...
    def apply(self, x: Matrix[np.float32], out: Matrix[np.float32], isa: str = "") -> None:
        """The members' outputs side by side, in out (T, sum N), for x (T, K)."""

class LowRank16:
    """`LowRank32` with `bt` and `at` as the bits of bfloat16."""

    def __init__(
        self, bt: Matrix[np.uint16], at: Sequence[Matrix[np.uint16]], bias: Sequence[Vector[np.float32] | None]
    ) -> None: ...
    def apply(self, x: Matrix[np.float32], out: Matrix[np.float32], isa: str = "") -> None: ...

def rms_norm(
    x: Matrix[np.float32], weight: Vector[np.float32], eps: float, out: Matrix[np.float32], isa: str = ""
) -> None:
    """out (T, N) = x (T, N) / rms(x) * weight (N,)."""

def gated(both: Matrix[np.float32], out: Matrix[np.float32], isa: str = "") -> None:
    """out (T, N) = SiLU of the first N columns of both (T, 2 N), times the others."""

def rotate(heads: Cube[np.float32], cos: Matrix[np.float32], sin: Matrix[np.float32], isa: str = "") -> None:
    """Rotary embedding of heads (B, H, D), each (H, D) contiguous, by cos and sin (B or 1, D), in place."""

def first_seen(mask: Matrix[np.bool_], out: Vector[np.int64]) -> bool:
    """Where in `mask` (B, S) each row's run of True begins that ends it, in out (B,). False, and no meaningful result,
    if a row is not False up to there, or has none. The mask need not be contiguous."""

def attend(
    queries: Cube[np.float32],
    keys: Four[np.float32],
    values: Four[np.float32],
    starts: Vector[np.int64] | None,
    scale: float,
    out: Cube[np.float32],
    isa: str = "",
) -> None:
    """out (B, H, D) = softmax(scale q K^T) V for queries (B, H, D), keys and values (B, G, S, D), H / G heads to each
    of G, sequence b seeing keys from starts[b] on. Each (H, D) of queries is contiguous, each (D,) of the others."""

class Ragged:
    """The N rows of one pass: row r is the token at positions[r] of sequence owners[r], whose keys and values (L, 2, G,
    S, D), of L layers, are memories[owners[r]]. Refers to the arrays that it is given."""

    def __init__(
        self, memories: Sequence[Five[np.float32]], owners: Vector[np.int64], positions: Vector[np.int64]
    ) -> None: ...
    def attend(self, layer: int, heads: Cube[np.float32], scale: float, out: Cube[np.float32], isa: str = "") -> None:
        """Write the keys and values of heads (N, H + 2 G, D), which has the rows' queries, keys and values, to their
        places; then out (N, H, D) = softmax(scale q K^T) V, each row seeing its sequence's positions up to its own."""

class Records:
    """What moves between a socket and a TLS session of OpenSSL's, which `owner` keeps alive. `ssl`, `in_` and `out` are
    the addresses of its SSL and of its BIOs, which are memory; `functions` those of SSL_read, SSL_write, SSL_pending,
    SSL_get_error, BIO_read, BIO_write, BIO_get_mem_data and ERR_clear_error.

    For one thread at a time. `fd` is the socket. `silence` (seconds) is how long the peer may be silent: below 0 for
    ever, and at 0 nothing waits. `deadline` is in `time.monotonic` and may be infinite: then it is `silence` after the
    first bytes without data. Handlers of signals run, and may raise.

    Attributes:
        stop: what stopped the last call before it was done: 0 nothing, 1 TLS failed or ended (`result` is what SSL_read
            or SSL_write returned, and the reasons are still in OpenSSL's queue of this thread), 2 the end of the
            connection, 3 the system (`error` is its errno), 4 time was over, 5 it would have had to wait, 6 nothing
            but records without data came, 7 nor does the peer read what these are answered with.
        unsent: whether something is sealed that the socket had no room for.
        waiting: whether something was received that was not read.
    """

    def __init__(self, owner: object, ssl: int, in_: int, out: int, functions: Sequence[int]) -> None: ...
    def read(self, fd: int, into: object, least: int, silence: float, deadline: float) -> int:
        """Read at least so many bytes into memory, and what else is there and has room; how many, fewer if something
        stopped it."""
    def write(self, fd: int, data: object, silence: float) -> int:
        """Send what is unsent, then seal and send `data`, bytes in memory; how many were sealed, fewer if something
        stopped it."""
    def flush(self, fd: int, silence: float) -> bool:
        """Send what is unsent; whether all of it went."""
    @property
    def unsent(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    @property
    def stop(self) -> int: ...
    @property
    def result(self) -> int: ...
    @property
    def error(self) -> int: ...

def wait_readable(fd: int, expected: float, spin: float) -> bool:
    """Whether the socket has something to read, or an end, or an error. Sleeps so as to be awake shortly before
    `expected` microseconds are over, by how late this thread woke before; then stays awake for `spin` more."""
