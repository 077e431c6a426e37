"""Frames: what crosses the wire, byte by byte. `docs/protocol.md` is the specification, with test vectors.

Nothing here touches a socket. Everything that arrives goes through `parse_header` before one byte of payload
is read or one byte of memory is reserved for it, so a hostile peer can cost at most one bounded frame.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from sliplm.errors import ProtocolError, VersionError

VERSIONS = (2, 4)
"""The oldest and the newest protocol version that this code speaks. A field of a message or a code that is new needs a
new one: the other side refuses what it does not know."""

MAGIC = b"SLIP"
HEADER = struct.Struct("<BBHIII")
"""kind u8, version u8, group u16, rows u32, sequence u32, payload length u32; little-endian, 16 bytes."""

MAX_ROWS = 1024
MAX_ARRAY_BYTES = 256 << 20
MAX_JSON_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 10
MAX_NAME_BYTES = 128

NAMELESS = "model"
"""What a model without a name is called: clients take an empty one for none."""

_HELLO = struct.Struct("<4sBBBx32s")
_WELCOME = struct.Struct("<Bxxx32s")
_PADS = struct.Struct("<32sII")
_BLOCKS = struct.Struct("<QIBBxx")
_DROP = struct.Struct("<Q")

OPEN_VERSION = 4
"""From which on open blocks are spoken of."""

DRAFTS_VERSION = 4
"""From which on a Chunk counts tokens that were guessed."""

STATE_BYTES = {1: 4, 2: 2}
"""Of one number of a hidden state, by the type that BLOCKS names: 1 is float32, 2 is bfloat16."""


class Kind(enum.IntEnum):
    """What a frame is. The comment names who sends it, and on which kind of connection."""

    HELLO = 1  # edge, first frame of every connection
    WELCOME = 2  # trusted, the answer to HELLO
    EXCHANGE = 3  # trusted, WORK: masked rows
    RESULT = 4  # edge, WORK: the product
    ERROR = 5  # either side: one sentence; `group` holds an errors.Code
    PING = 6  # trusted, WORK, when idle
    PONG = 7  # edge, WORK
    GENERATE = 8  # edge, REQUEST: a GenerateRequest as JSON
    TEXT = 9  # trusted, REQUEST: a Chunk as JSON
    DONE = 10  # trusted, REQUEST: the last Chunk
    PADS = 11  # trusted, HELP: a key, and which of its rows to multiply
    IMAGES = 12  # helper, HELP: the products
    BLOCKS = 13  # trusted, WORK: hidden states before a run of open blocks
    STATES = 14  # edge, WORK: those after it
    DROP = 15  # trusted, WORK: forget a request; there is no answer


class Role(enum.IntEnum):
    """What a connection is for, said in HELLO."""

    WORK = 1
    REQUEST = 2
    HELP = 3  # from version 3 on


class Header(NamedTuple):
    kind: int
    version: int
    group: int
    rows: int
    sequence: int
    length: int


class Hello(NamedTuple):
    oldest: int
    newest: int
    role: Role
    digest: bytes


class PadsWanted(NamedTuple):
    """What PADS asks for: the products of the rows `first` to `first + rows - 1` of `key` (docs/protocol.md)."""

    key: bytes
    first: int
    rows: int

    def __repr__(self) -> str:
        return f"PadsWanted(<secret>, {self.first}, {self.rows})"


class Blocks(NamedTuple):
    """What BLOCKS says before its rows: whose they are, the position of the first one, the type of their numbers (a key
    of STATE_BYTES), and whether the edge keeps what it has of this request's positions in this run."""

    request: int
    start: int
    type: int
    keep: bool


BLOCKS_BYTES = _BLOCKS.size


class Welcome(NamedTuple):
    version: int
    digest: bytes
    model_name: str


# Kind -> (shortest payload, longest payload, bytes of the smallest number in its rows or 0 for none, bytes before them,
# `group` may be non-zero)
_RULES: dict[int, tuple[int, int, int, int, bool]] = {
    Kind.HELLO: (_HELLO.size, _HELLO.size, 0, 0, False),
    Kind.WELCOME: (_WELCOME.size, _WELCOME.size + MAX_NAME_BYTES, 0, 0, False),
    Kind.EXCHANGE: (4, MAX_ARRAY_BYTES, 4, 0, True),
    Kind.RESULT: (4, MAX_ARRAY_BYTES, 4, 0, True),
    Kind.ERROR: (0, MAX_ERROR_BYTES, 0, 0, True),
    Kind.PING: (0, 0, 0, 0, False),
    Kind.PONG: (0, 0, 0, 0, False),
    Kind.GENERATE: (2, MAX_JSON_BYTES, 0, 0, False),
    Kind.TEXT: (2, MAX_JSON_BYTES, 0, 0, False),
    Kind.DONE: (2, MAX_JSON_BYTES, 0, 0, False),
    Kind.PADS: (_PADS.size, _PADS.size, 0, 0, True),
    Kind.IMAGES: (4, MAX_ARRAY_BYTES, 4, 0, True),
    Kind.BLOCKS: (_BLOCKS.size + 2, MAX_ARRAY_BYTES, 2, _BLOCKS.size, True),
    Kind.STATES: (2, MAX_ARRAY_BYTES, 2, 0, True),
    Kind.DROP: (_DROP.size, _DROP.size, 0, 0, False),
}


def parse_header(data: bytes | bytearray | memoryview, version: int) -> Header:
    """The header in `data` (16 bytes), checked against every limit that does not depend on the model's
    shapes.

    `version` is the one agreed on, or 0 before that. Raises ProtocolError.
    """
    if len(data) != HEADER.size:
        raise ProtocolError(f"a frame header has {HEADER.size} bytes, not {len(data)}")
    header = tuple.__new__(Header, HEADER.unpack(data))  # as `_make` does, which is another call
    kind, seen, group, rows, _, length = header
    rule = _RULES.get(kind)
    if rule is None:
        raise ProtocolError(f"the other side sent a frame of the unknown kind {kind}")
    # An ERROR may come before or instead of a WELCOME, when its sender knows no agreed version yet.
    if seen != version and not (kind == Kind.ERROR and seen == 0):
        raise ProtocolError(f"the other side sent a frame of protocol version {seen}, not {version}")
    if kind >= Kind.BLOCKS and version < OPEN_VERSION:
        raise ProtocolError(f"the other side sent {Kind(kind).name}, which protocol version {version} does not have")
    shortest, longest, number, before, has_group = rule
    if not shortest <= length <= longest:
        raise ProtocolError(f"the other side announced a {Kind(kind).name} frame of {length} bytes")
    if number:
        if not 1 <= rows <= MAX_ROWS or (length - before) % (number * rows):
            raise ProtocolError(f"the other side announced {rows} rows in {length} bytes")
    elif rows or (group and not has_group):
        raise ProtocolError(f"the other side sent a {Kind(kind).name} frame with a rows or group field")
    return header


def pack_hello(hello: Hello) -> bytes:
    """The 40-byte payload of HELLO."""
    return _HELLO.pack(MAGIC, hello.oldest, hello.newest, hello.role, hello.digest)


def parse_hello(payload: bytes) -> Hello:
    """Raises VersionError unless `payload` is a well-formed HELLO: the peer speaks something else."""
    if len(payload) != _HELLO.size:
        raise VersionError("the other side sent a HELLO of the wrong length")
    magic, oldest, newest, role, digest = _HELLO.unpack(payload)
    if magic != MAGIC or not 1 <= oldest <= newest or payload[7]:
        raise VersionError("the other side does not speak this protocol")
    try:
        return Hello(oldest, newest, Role(role), digest)
    except ValueError:
        raise VersionError(f"the other side asked for a connection of the unknown role {role}") from None


def choose_version(hello: Hello) -> int:
    """The newest version both sides speak. Raises VersionError if there is none."""
    version = min(hello.newest, VERSIONS[1])
    if version < max(hello.oldest, VERSIONS[0]):
        raise VersionError(
            f"the edge speaks protocol {_span(hello.oldest, hello.newest)}, the trusted side "
            f"{_span(*VERSIONS)}: update the older one"
        )
    return version


def _span(oldest: int, newest: int) -> str:
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"


def pack_welcome(welcome: Welcome) -> bytes:
    """The payload of WELCOME: 36 bytes, then the model's public name."""
    name = clean(welcome.model_name, MAX_NAME_BYTES) or NAMELESS
    return _WELCOME.pack(welcome.version, welcome.digest) + name.encode()


def parse_welcome(payload: bytes) -> Welcome:
    """Raises ProtocolError unless `payload` is a WELCOME with a version that this code offered."""
    if len(payload) < _WELCOME.size or any(payload[1:4]):
        raise ProtocolError("the other side sent a malformed WELCOME")
    version, digest = _WELCOME.unpack_from(payload)
    if not VERSIONS[0] <= version <= VERSIONS[1]:
        raise ProtocolError(f"the trusted side chose protocol version {version}, which was not offered")
    name = payload[_WELCOME.size :].decode("utf-8", "replace")
    return Welcome(version, digest, clean(name, MAX_NAME_BYTES) or NAMELESS)


def pack_pads(wanted: PadsWanted) -> bytes:
    """The 40-byte payload of PADS."""
    return _PADS.pack(*wanted)


def parse_pads(payload: bytes) -> PadsWanted:
    """Raises ProtocolError unless `payload` asks for 1 to MAX_ROWS rows, the last of which has a number of 32 bits."""
    wanted = PadsWanted(*_PADS.unpack(payload))
    if not 1 <= wanted.rows <= MAX_ROWS or wanted.first + wanted.rows > 1 << 32:
        raise ProtocolError(f"the other side asked for {wanted.rows} pads from row {wanted.first} on")
    return wanted


def pack_blocks(asked: Blocks) -> bytes:
    """The 16 bytes before the rows of BLOCKS."""
    return _BLOCKS.pack(*asked)


def parse_blocks(payload: bytes, width: int, rows: int) -> Blocks:
    """The same from the `payload` of BLOCKS with so many `rows` of `width` numbers. Raises ProtocolError."""
    request, start, kind, keep = _BLOCKS.unpack_from(payload)
    if kind not in STATE_BYTES or keep > 1 or any(payload[14:16]):
        raise ProtocolError("the other side sent a malformed BLOCKS")
    if len(payload) != _BLOCKS.size + rows * width * STATE_BYTES[kind]:
        raise ProtocolError(f"open blocks take rows of {width} numbers")
    if start + rows > 1 << 32:
        raise ProtocolError(f"the other side sent {rows} hidden states from position {start} on")
    return Blocks(request, start, kind, bool(keep))


def pack_drop(request: int) -> bytes:
    """The 8-byte payload of DROP."""
    return _DROP.pack(request)


def parse_drop(payload: bytes) -> int:
    """The request that DROP names."""
    found: int = _DROP.unpack(payload)[0]
    return found


def clean(text: str, limit: int = MAX_ERROR_BYTES) -> str:
    """`text` on one line, printable characters only, at most `limit` bytes of UTF-8.

    Applied when sending and again on arrival: the text ends up on somebody's terminal and in logs.
    """
    printable = "".join(c if c.isprintable() else " " for c in text[:limit])
    return printable.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore").strip()
