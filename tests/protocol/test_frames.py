"""Frames: the specification's own test vectors, and hostile input to every parser."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import Code, ProtocolError, RequestError, VersionError
from sliplm.protocol import frames
from sliplm.protocol.frames import HEADER, Hello, Kind, PadsWanted, Role, Welcome
from sliplm.protocol.messages import Chunk, GenerateRequest, Message, decode_chunk, decode_request, encode

SPECIFICATION = Path(__file__).parents[2] / "docs" / "protocol.md"
DIGEST = bytes(range(32))
VERSION = frames.VERSIONS[1]


def vectors(block: str) -> dict[str, bytes]:
    text = re.search(rf"```{block}\n(.*?)```", SPECIFICATION.read_text("utf-8"), re.DOTALL)
    assert text
    lines = (line.split(maxsplit=1) for line in text[1].strip().splitlines())
    return {name: bytes.fromhex(digits) for name, digits in lines}


def frame(kind: int, version: int, payload: bytes, group: int = 0, rows: int = 0, sequence: int = 0) -> bytes:
    return HEADER.pack(kind, version, group, rows, sequence, len(payload)) + payload


def array(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


REQUEST = 0x0807060504030201
STATES = np.array([[0.5, -1, 3], [0, 2, -0.25]], "<f4")
HALVES = bytes.fromhex("003f 80bf 4040")  # the first row, as bfloat16
BLOCKS = frames.pack_blocks(frames.Blocks(REQUEST, 7, 1, True))
HALF = frames.pack_blocks(frames.Blocks(REQUEST, 7, 2, False))

MADE = {
    "hello-work": frame(Kind.HELLO, 0, frames.pack_hello(Hello(*frames.VERSIONS, Role.WORK, DIGEST))),
    "hello-help": frame(Kind.HELLO, 0, frames.pack_hello(Hello(*frames.VERSIONS, Role.HELP, DIGEST))),
    "hello-request": frame(Kind.HELLO, 0, frames.pack_hello(Hello(*frames.VERSIONS, Role.REQUEST, DIGEST))),
    "welcome": frame(Kind.WELCOME, 0, frames.pack_welcome(Welcome(VERSION, DIGEST, "demo"))),
    "exchange": frame(Kind.EXCHANGE, VERSION, array(0, 1, 2**31 - 2, 2, 3, 4), group=1, rows=2, sequence=7),
    "result": frame(Kind.RESULT, VERSION, array(10, 11, 12, 13), group=1, rows=2, sequence=7),
    "error-bundle": frame(Kind.ERROR, 0, b"why?!", group=Code.BUNDLE),
    "ping": frame(Kind.PING, VERSION, b"", sequence=8),
    "pong": frame(Kind.PONG, VERSION, b"", sequence=8),
    "pads": frame(Kind.PADS, VERSION, frames.pack_pads(PadsWanted(bytes(range(32)), 16, 3)), group=1, sequence=9),
    "blocks": frame(Kind.BLOCKS, VERSION, BLOCKS + STATES.tobytes(), group=1, rows=2, sequence=10),
    "states": frame(Kind.STATES, VERSION, STATES.tobytes(), group=1, rows=2, sequence=10),
    "blocks-bf16": frame(Kind.BLOCKS, VERSION, HALF + HALVES, group=1, rows=1, sequence=10),
    "states-bf16": frame(Kind.STATES, VERSION, HALVES, group=1, rows=1, sequence=10),
    "drop": frame(Kind.DROP, VERSION, frames.pack_drop(REQUEST)),
    "images": frame(Kind.IMAGES, VERSION, array(*range(10, 16)), group=1, rows=3, sequence=9),
}


def test_the_code_makes_the_vectors_of_the_specification():
    assert vectors("vectors") == MADE


@pytest.mark.parametrize("name", MADE)
def test_the_code_reads_the_vectors_of_the_specification(name):
    data = vectors("vectors")[name]
    header = frames.parse_header(data[: HEADER.size], data[1])
    assert header.length == len(data) - HEADER.size
    assert (header.group, header.rows, header.sequence) == HEADER.unpack(data[:16])[2:5]


@pytest.mark.parametrize("name", vectors("refused"))
def test_the_specification_s_bad_headers_are_refused(name):
    with pytest.raises(ProtocolError):
        frames.parse_header(vectors("refused")[name], VERSION)


def within_limits_or_refused(data: bytes, version: int) -> None:
    try:
        header = frames.parse_header(data, version)
    except ProtocolError as error:
        assert "\n" not in str(error)
        return
    assert len(data) == 16 and header == HEADER.unpack(data)
    assert header.length <= 256 << 20 and header.rows <= 1024
    if header.rows:
        arrays = {
            Kind.EXCHANGE: (4, 0),
            Kind.RESULT: (4, 0),
            Kind.IMAGES: (4, 0),
            Kind.BLOCKS: (2, 16),
            Kind.STATES: (2, 0),
        }
        number, before = arrays[header.kind]
        assert header.length > before and (header.length - before) % (number * header.rows) == 0
    if header.kind >= Kind.BLOCKS:
        assert version >= 4


@given(st.binary(max_size=40), st.integers(0, 255))
def test_random_bytes_are_a_sane_header_or_a_protocol_error(data, version):
    within_limits_or_refused(data, version)


U32 = st.integers(0, 2**32 - 1)


@given(st.integers(0, 16), st.integers(0, 4), st.integers(0, 2**16 - 1), st.integers(0, 1100), U32, U32)
def test_plausible_headers_too(kind, version, group, rows, sequence, length):
    within_limits_or_refused(HEADER.pack(kind, version, group, rows, sequence, length), VERSION)
    within_limits_or_refused(HEADER.pack(kind, version, group, rows, sequence, length), version)


@given(st.sampled_from((13, 14)), st.integers(0, 1100), st.integers(0, 20), st.sampled_from((2, 4)), st.integers(0, 17))
def test_headers_of_hidden_states_too(kind, rows, width, number, more):
    within_limits_or_refused(HEADER.pack(kind, VERSION, 0, rows, 1, rows * width * number + more), VERSION)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 4), st.sampled_from((1, 2)), st.booleans(), st.integers(1, 9))
def test_what_blocks_says_survives_the_trip(request, start, kind, keep, width):
    asked = frames.Blocks(request, start, kind, keep)
    rows = bytes(4 * width * frames.STATE_BYTES[kind])
    assert frames.parse_blocks(frames.pack_blocks(asked) + rows, width, 4) == asked
    with pytest.raises(ProtocolError):
        frames.parse_blocks(frames.pack_blocks(asked) + rows + b"\0", width, 4)
    assert frames.parse_drop(frames.pack_drop(request)) == request


@given(st.binary(min_size=18, max_size=60), st.integers(1, 8), st.integers(1, 4))
def test_random_bytes_are_sane_blocks_or_a_protocol_error(data, width, rows):
    try:
        asked = frames.parse_blocks(data, width, rows)
    except ProtocolError as error:
        assert "\n" not in str(error)
        return
    assert asked.type in (1, 2) and asked.keep in (False, True) and asked.start + rows <= 1 << 32
    assert len(data) == 16 + rows * width * frames.STATE_BYTES[asked.type]


@given(st.binary(max_size=200))
def test_hello_and_welcome_take_nothing_malformed(data):
    for parse in (frames.parse_hello, frames.parse_welcome):
        try:
            parsed = parse(data)
        except ProtocolError:
            continue
        assert len(parsed.digest) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda p: b"HTTP" + p[4:],
        lambda p: p[:4] + b"\0" + p[5:],
        lambda p: p[:4] + b"\2\1" + p[6:],
        lambda p: p[:6] + b"\4" + p[7:],
        lambda p: p[:7] + b"\1" + p[8:],
        lambda p: p[:-1],
    ],
)
def test_hello_is_strict(change):
    good = frames.pack_hello(Hello(*frames.VERSIONS, Role.WORK, DIGEST))
    assert frames.parse_hello(good) == Hello(*frames.VERSIONS, Role.WORK, DIGEST)
    with pytest.raises(ProtocolError):
        frames.parse_hello(change(good))


def test_versions_are_negotiated():
    assert frames.choose_version(Hello(1, 9, Role.WORK, DIGEST)) == VERSION
    assert frames.choose_version(Hello(1, 2, Role.WORK, DIGEST)) == 2
    assert frames.choose_version(Hello(2, 3, Role.WORK, DIGEST)) == 3
    with pytest.raises(VersionError, match="versions 5 to 6, the trusted side versions 2 to 4: update the older one"):
        frames.choose_version(Hello(5, 6, Role.WORK, DIGEST))
    with pytest.raises(VersionError, match="version 1, the trusted side versions 2 to 4: update the older one"):
        frames.choose_version(Hello(1, 1, Role.WORK, DIGEST))
    with pytest.raises(ProtocolError, match="not offered"):
        frames.parse_welcome(frames.pack_welcome(Welcome(1, DIGEST, "")))


WIRE = {2: "41c660d9fab94b06", 3: "cfe2052b3e537243", 4: "e47080b699e381c0"}
"""Of each version, the hash of its messages and codes. Never change one that is released: add a version."""


def shape(schema):
    """A JSON schema without its texts for people; a property may be called like one of them."""
    if isinstance(schema, dict):
        people = {key for key in ("description", "title") if isinstance(schema.get(key), str)}
        return {key: shape(value) for key, value in schema.items() if key not in people}
    return [shape(value) for value in schema] if isinstance(schema, list) else schema


def test_a_change_of_what_crosses_the_wire_is_a_new_version():
    """Otherwise sides of two ages find out at some request, by a refusal that says something else."""
    messages = shape(msgspec.json.schema_components([GenerateRequest, Chunk])[1])
    codes = {code.name: code.value for code in Code}
    kinds = {kind.name: kind.value for kind in Kind}
    data = msgspec.json.encode([messages, codes, kinds], order="sorted")
    assert hashlib.sha256(data).hexdigest()[:16] == WIRE[VERSION]


@given(st.text())
def test_clean_text_is_one_short_printable_line(text):
    cleaned = frames.clean(text, 50)
    assert cleaned.isprintable() and len(cleaned.encode()) <= 50


def test_clean_text_has_no_terminal_escapes():
    assert frames.clean("no\x1b[31m\r\nred\u202e\ud800") == "no [31m  red"


@given(st.binary(max_size=300))
def test_json_is_a_message_or_one_sentence(data):
    for decode, error in ((decode_request, RequestError), (decode_chunk, ProtocolError)):
        try:
            decode(data)
        except error as problem:
            assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "either a prompt or messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "not both"),
        ('{"messages": []}', "empty"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "a", "temperature": NaN}', "malformed"),
        ('{"prompt": "a", "top_p": 0}', "top_p"),
        ('{"prompt": "a", "seed": -1}', "seed"),
        ('{"prompt": "a", "stop": [""]}', "stop"),
        ('{"prompt": "a", "tempereture": 1}', "tempereture"),
        ('{"prompt": "a"', "truncated"),
        ("[" * 100_000, "not valid"),
    ],
)
def test_a_bad_request_is_named(text, says):
    with pytest.raises(RequestError, match=says):
        decode_request(text.encode())


def test_messages_survive_the_trip():
    request = GenerateRequest(messages=[Message("user", "Grüße 👋")], stop=["\n"], seed=5)
    assert decode_request(encode(request)) == request
    chunk = Chunk("x", "stop", 3, 4)
    assert decode_chunk(encode(chunk)) == chunk


def test_prompts_stay_out_of_reprs():
    message = Message("user", "secret")
    for thing in (
        message,
        GenerateRequest(messages=[message]),
        GenerateRequest(prompt="secret"),
        Chunk("secret"),
    ):
        assert "secret" not in repr(thing)


def test_what_cannot_be_sent_is_a_request_error():
    for text in ("x" * (1 << 20), "\ud800"):
        with pytest.raises(RequestError):
            encode(GenerateRequest(prompt=text))


def test_the_specification_s_json_is_a_request():
    blocks = re.findall(r"```json\n(.*?)```", SPECIFICATION.read_text("utf-8"), re.DOTALL)
    defaults = msgspec.json.decode(blocks[0])
    assert defaults == msgspec.structs.asdict(GenerateRequest(prompt="x")) | {"prompt": None}
    assert decode_chunk(blocks[1].encode()).text == " Paris"
