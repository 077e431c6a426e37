"""The test vectors for other implementations, `vectors.json`: our code makes every one of them, and reads it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.soak import plain
from sliplm import field, kernels
from sliplm.edge.multiplier import Multiplier
from sliplm.errors import Code, ProtocolError, SlipError
from sliplm.exchange.check import check
from sliplm.exchange.operator import Operator
from sliplm.protocol import frames
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import HEADER, Hello, Kind, PadsWanted, Role, Welcome
from sliplm.protocol.messages import decode_chunk, decode_request, encode
from sliplm.protocol.session import Session

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("vectors.json").read_text("utf-8"))
SPECIFICATION = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
X = VECTORS["exchange"]


def named(entries: list[dict[str, Any]]) -> Any:
    return [pytest.param(entry, id=entry["name"]) for entry in entries]


def elements(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, np.uint32)


class Wire:
    """A channel of ours, and the bytes that it sends and gets."""

    def __init__(self, version: int) -> None:
        ours, self._theirs = socket.socketpair()
        self.channel: Any = Channel(Session(ours, plain.Context()), "the other side", 5)  # type: ignore[arg-type]
        self.channel.version = version

    def sent(self) -> str:
        self.channel.close()
        with self._theirs:
            return b"".join(iter(lambda: self._theirs.recv(1 << 16), b"")).hex()

    def gets(self, digits: str) -> Any:
        """The header of the frame in `digits`, as the channel received it."""
        with self._theirs:
            self._theirs.sendall(bytes.fromhex(digits))
        return self.channel.receive()


@pytest.fixture
def wire() -> Iterator[Any]:
    made: list[Wire] = []

    def make(version: int) -> Wire:
        made.append(Wire(version))
        return made[-1]

    yield make
    for one in made:
        one.channel.close()
        one._theirs.close()


def listed(block: str) -> dict[str, str]:
    """A block of the specification: names, and digits without their spaces."""
    found = re.search(rf"```{block}\n(.*?)```", SPECIFICATION, re.DOTALL)
    assert found
    lines = (line.split(maxsplit=1) for line in found[1].strip().splitlines())
    return {name: digits.replace(" ", "") for name, digits in lines}


def test_the_file_and_the_specification_have_the_same_frames() -> None:
    assert {f["name"]: f["hex"] for f in VECTORS["frames"]} == listed("vectors")
    assert VECTORS["refused_headers"] == listed("refused")
    assert VECTORS["version"] == frames.VERSIONS[1]


def payload(frame: dict[str, Any]) -> bytes:
    """Made anew from what the vector says in words."""
    if frame["kind"] == "HELLO":
        digest = bytes.fromhex(frame["digest"])
        return frames.pack_hello(Hello(frame["oldest"], frame["newest"], Role(frame["role"]), digest))
    if frame["kind"] == "WELCOME":
        return frames.pack_welcome(Welcome(frame["chosen"], bytes.fromhex(frame["digest"]), frame["model"]))
    if frame["kind"] == "PADS":
        return frames.pack_pads(PadsWanted(bytes.fromhex(frame["key"]), frame["first"], frame["count"]))
    if frame["kind"] == "BLOCKS":
        asked = frames.Blocks(frame["request"], frame["start"], frame["type"], frame["keep"])
        return frames.pack_blocks(asked) + states(frame)
    if frame["kind"] == "STATES":
        return states(frame)
    if frame["kind"] == "DROP":
        return frames.pack_drop(frame["request"])
    return frame.get("sentence", "").encode()


def states(frame: dict[str, Any]) -> bytes:
    """Those of the vector, all of which bfloat16 can hold: its 16 bits are the higher ones of float32's."""
    numbers = np.array(frame["states"], "<f4")
    return numbers.tobytes() if frame["type"] == 1 else (numbers.view("<u4") >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize("frame", named(VECTORS["frames"]))
def test_frames_are_sent_and_received_byte_by_byte(frame: dict[str, Any], wire: Any) -> None:
    kind = Kind[frame["kind"]]
    sender, receiver = wire(frame["version"]), wire(frame["version"])
    if "array" in frame:
        rows = elements(frame["array"])
        staged = sender.channel.stage(*rows.shape)
        staged[:] = rows
        sender.channel.send_staged(kind, frame["group"], frame["sequence"], staged)
    else:
        where = {key: frame[key] for key in ("group", "rows", "sequence")}
        sender.channel.send(kind, payload(frame), **where)
    assert sender.sent() == frame["hex"]
    header = receiver.gets(frame["hex"])
    assert header == (kind, frame["version"], frame["group"], frame["rows"], frame["sequence"], header.length)
    if "array" in frame:
        got = np.empty_like(rows)
        receiver.channel.read_array(got)
        assert np.array_equal(got, rows)
    else:
        assert receiver.channel.read(header) == payload(frame)


def test_greetings_say_what_the_file_says() -> None:
    read = {f["name"]: bytes.fromhex(f["hex"])[HEADER.size :] for f in VECTORS["frames"]}
    digest = bytes(range(32))
    assert frames.parse_hello(read["hello-work"]) == Hello(2, 4, Role.WORK, digest)
    assert frames.parse_hello(read["hello-request"]) == Hello(2, 4, Role.REQUEST, digest)
    assert frames.parse_hello(read["hello-help"]) == Hello(2, 4, Role.HELP, digest)
    assert frames.parse_welcome(read["welcome"]) == Welcome(4, digest, "demo")


@pytest.mark.parametrize("name", VECTORS["refused_headers"])
def test_bad_headers_are_refused(name: str, wire: Any) -> None:
    with pytest.raises(ProtocolError):
        wire(VECTORS["version"]).gets(VECTORS["refused_headers"][name])


@pytest.mark.parametrize(
    ("parse", "block"),
    [
        (frames.parse_hello, "refused_hello_payloads"),
        (frames.parse_welcome, "refused_welcome_payloads"),
        (frames.parse_pads, "refused_pads_payloads"),
        (lambda payload: frames.parse_blocks(payload, 2, 1), "refused_blocks_payloads"),
    ],
)
def test_bad_greetings_are_refused(parse: Any, block: str) -> None:
    for name, digits in VECTORS[block].items():
        with pytest.raises(ProtocolError):
            raise AssertionError(f"{name}: {parse(bytes.fromhex(digits))}")


def test_every_code_has_a_vector() -> None:
    assert {e["name"]: e["code"] for e in VECTORS["errors"]} == {c.name: c.value for c in Code}


@pytest.mark.parametrize("error", named(VECTORS["errors"]))
def test_errors(error: dict[str, Any], wire: Any) -> None:
    sender, receiver = wire(error["version"]), wire(error["version"])
    sender.channel.send_error(Code[error["name"]], error["sentence"], error["seconds"])
    assert sender.sent() == error["hex"]
    header = receiver.gets(error["hex"])
    raised = receiver.channel.read_error(header)
    assert header.group == error["code"] and isinstance(raised, SlipError) and str(raised) == error["sentence"]
    assert (getattr(raised, "retry_after", None) or 0) == error["seconds"]


def test_field_elements() -> None:
    f = VECTORS["field"]
    assert f["p"] == field.P
    for operation, cases in ((field.add, f["add"]), (field.sub, f["sub"])):
        a, b, want = (np.array(column, np.uint32) for column in zip(*cases, strict=True))
        assert operation(a, b).tolist() == want.tolist()
    for one, cases, kind in ((field.lift, f["lift"], np.int64), (field.centre, f["centre"], np.uint32)):
        values, want = zip(*cases, strict=True)
        assert one(np.array(values, kind)).tolist() == list(want)


def test_an_input_is_masked_with_its_pad_and_unmasked() -> None:
    masked = field.add(field.lift(np.array(X["x"])), elements(X["pad"]))
    assert masked.tolist() == X["masked"]
    product = field.centre(field.sub(elements(X["answer"]), elements(X["image"])))
    assert product.tolist() == X["product"] == (np.array(X["x"]) @ np.array(X["q"]).T).tolist()


@pytest.mark.parametrize("backend", [b for b in ("native", "portable") if b in kernels.available_backends()])
def test_products(backend: str) -> None:
    edge = Multiplier([kernels.prepare(np.array(X["q"], np.int8), backend)], bytes(32))
    for asked, answered in (("masked", "answer"), ("pad", "image")):
        assert edge.product(0, elements(X[asked])).tolist() == X[answered]


def test_right_answers_pass_the_check_and_wrong_ones_do_not() -> None:
    q, u, uq = np.array(X["q"], np.int8), elements(X["u"]), elements(X["uq"])
    assert field.project(u, q).tolist() == X["uq"]
    op = Operator(0, q.shape, 1.0, np.ones((1, len(q)), np.float32), None, None, u, uq)
    masked = elements(X["masked"])
    assert check(op, masked, elements(X["answer"]))
    for name, wrong in X["wrong"].items():
        assert not check(op, masked, elements(wrong)), name


def test_the_exchange_as_frames(wire: Any) -> None:
    for kind, array, digits in (
        (Kind.EXCHANGE, X["masked"], X["exchange_frame"]),
        (Kind.RESULT, X["answer"], X["result_frame"]),
    ):
        sender, rows = wire(VECTORS["version"]), elements(array)
        staged = sender.channel.stage(*rows.shape)
        staged[:] = rows
        sender.channel.send_staged(kind, X["group"], X["sequence"], staged)
        assert sender.sent() == digits


@pytest.mark.parametrize("message", named(VECTORS["messages"]))
def test_messages(message: dict[str, Any], wire: Any) -> None:
    """The text is as we send it, without what has its default. What it means has every field."""
    decode: Any = decode_request if message["kind"] == "GENERATE" else decode_chunk
    read = decode(message["json"].encode())
    assert set(message["means"]) == set(read.__struct_fields__)
    assert decode(json.dumps(message["means"]).encode()) == read
    sender, receiver = wire(VECTORS["version"]), wire(VECTORS["version"])
    sender.channel.send(Kind[message["kind"]], encode(read))
    assert sender.sent() == message["hex"]
    assert receiver.channel.read(receiver.gets(message["hex"])) == message["json"].encode()


def test_bad_messages_are_refused() -> None:
    for block, decode in (("refused_generate", decode_request), ("refused_chunks", decode_chunk)):
        for name, text in VECTORS[block].items():
            with pytest.raises(SlipError):
                raise AssertionError(f"{name}: {decode(text.encode())}")  # type: ignore[operator]
