"""Frames with something wrong, made from valid ones."""

from __future__ import annotations

import json
import random
import struct

from sliplm.protocol.frames import HEADER, VERSIONS, Kind

VERSION = VERSIONS[1]

_NUMBERS = (0, 1, 2, 3, 15, 16, 127, 128, 255, 256, 1023, 1024, 1025, 65535, 1 << 20, 1 << 28, 1 << 31, (1 << 32) - 1)


def mutate(frame: bytes, rng: random.Random) -> bytes:
    """`frame` with one or more things wrong: fields, bits, length, kind, everything."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        match rng.randrange(8):
            case 0:  # a bit anywhere
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:  # a number in the header
                offset, size = rng.choice(((0, 1), (1, 1), (2, 2), (4, 4), (8, 4), (12, 4)))
                number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(32)
                data[offset : offset + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            case 2:  # a length slightly off
                length = struct.unpack_from("<I", data, 12)[0] + rng.choice((-4, -1, 1, 4))
                struct.pack_into("<I", data, 12, length & 0xFFFFFFFF)
            case 3:  # broken off
                data = data[: rng.randrange(1, len(data) + 1)]
            case 4:  # more than announced
                data += rng.randbytes(rng.randrange(1, 64))
            case 5:  # a random stretch
                start = rng.randrange(len(data))
                stretch = rng.randbytes(rng.randrange(1, 32))
                data[start : start + len(stretch)] = stretch
            case 6:  # another kind
                data[0] = rng.randrange(13)
            case 7:  # noise
                data = bytearray(rng.randbytes(rng.randrange(1, 200)))
        data = data if len(data) >= HEADER.size else data.ljust(HEADER.size, b"\0")
    return bytes(data)


def frame(kind: Kind, version: int, payload: bytes, group: int = 0, rows: int = 0, sequence: int = 0) -> bytes:
    return HEADER.pack(kind, version, group, rows, sequence, len(payload)) + payload


def refused_request(rng: random.Random) -> bytes:
    """A GENERATE payload that is refused as it stands: one that is accepted would occupy the server for a while."""
    body = rng.choice(
        (
            {"prompt": "x", "temperature": 9},
            {"prompt": "x", "max_tokens": 0},
            {"messages": []},
            {"prompt": None},
            {"messages": [{"role": "", "content": "x"}]},
            {"prompt": "x", "stop": [""] * 20},
            [[[[[[[[]]]]]]]],
            "\ud800"[:0] + "text",
        )
    )
    data = json.dumps(body).encode()
    return data if rng.random() < 0.7 else b"[" * rng.randrange(1, 100_000) + data
