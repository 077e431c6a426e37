"""Malformed frames, from enrolled edges to a running `slip trusted`, and from a trusted side to a running `slip edge`.

A bad frame ends its connection, so each costs a connection of its own. Therefore one in a hundred goes over TLS, one in
twenty-five to processes whose TLS is switched off (`plain`), and the others are read in this process by the code that
both sides read with: a channel, and what decodes the payload.

Every connection has to be closed by the side under attack within its time limit; that side has to stay up, with the
threads and descriptors that it had; and an honest edge that uses the same trusted side all the while has to get the
true text every time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.soak import plain
from bench.soak.processes import Command, Site, eventually, site, text
from sliplm.bundle import EdgeBundle
from sliplm.errors import Code, IdentityError, SlipError
from sliplm.protocol import tls
from sliplm.protocol.channel import Channel, connect, parse_address
from sliplm.protocol.frames import (
    HEADER,
    MAX_JSON_BYTES,
    VERSIONS,
    Hello,
    Kind,
    Role,
    Welcome,
    pack_hello,
    pack_welcome,
    parse_hello,
    parse_welcome,
)
from sliplm.protocol.messages import decode_chunk, decode_request
from sliplm.registry import authority

VERSION = VERSIONS[1]
PROMPT = "The capital of France is"
TOKENS = 2
PATIENCE = 15.0
"""Seconds after which a connection that the other side has not closed counts as hanging."""

WITH_TLS, TO_PROCESSES = 0.01, 0.05
"""The shares of the frames that go over TLS, and to processes at all."""

ALLOWED = {"threads": 4, "descriptors": 8}
"""So many more than before may be left: of the honest edge, and of pools that grow once."""

REST_SECONDS = 0.2
"""The honest edge's pause between two requests."""

_NUMBERS = (0, 1, 2, 3, 15, 16, 127, 128, 255, 256, 1023, 1024, 1025, 65535, 1 << 20, 1 << 28, 1 << 31, (1 << 32) - 1)


# --- frames ---------------------------------------------------------------------------------------------------------


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


def _json(rng: random.Random) -> bytes:
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


# --- a hostile edge -------------------------------------------------------------------------------------------------


class _Tally:
    """What is left to do, and what came of the rest."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._left = size
        self.sent: Counter[str] = Counter()
        self.refused = 0
        self.closed_after = 0.0
        self.problems: list[str] = []

    def next(self) -> bool:
        with self._lock:
            if self._left <= 0 or len(self.problems) >= 10:
                return False
            self._left -= 1
            return True

    def refuse(self) -> None:
        """The frame was not sent; another one will be."""
        with self._lock:
            self.refused += 1
            self._left += 1

    @property
    def done(self) -> bool:
        return self._left <= 0 or len(self.problems) >= 10

    def record(self, what: str, seconds: float | None) -> None:
        with self._lock:
            self.sent[what] += 1
            if seconds is None:
                self.problems.append(f"a connection was not closed within {PATIENCE:g} s after {what}")
            else:
                self.closed_after = max(self.closed_after, seconds)


def _until_closed(channel: Channel) -> float | None:
    """Say that nothing more will come; the seconds until the other side hangs up, or None if it does not."""
    started = time.monotonic()
    sock = channel._sock
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
    sock.settimeout(PATIENCE)
    try:
        while socket.socket.recv(sock, 1 << 16):  # below TLS: what it says does not matter
            pass
    except TimeoutError:
        return None
    except OSError:
        pass
    return time.monotonic() - started


class HostileEdge(threading.Thread):
    """An enrolled device that sends malformed frames at all stages of both conversations."""

    def __init__(self, here: Site, address: str, encrypted: bool, bundle: EdgeBundle, tally: _Tally, seed: int) -> None:
        super().__init__(name=f"hostile{seed}", daemon=True)
        self._address = parse_address(address)
        self._devices = here.registry.devices
        identity = here.enrol(self.name)
        self._context: Any = tls.client_context(identity) if encrypted else plain.context(identity)
        self._digest, self._shapes, self._tally = bundle.digest, bundle.shapes, tally
        self._rng = random.Random(seed)

    def run(self) -> None:
        while self._tally.next():
            what = self._rng.choices(("HELLO", "GENERATE", "RESULT", "first answer"), (45, 49.9, 5, 0.1))[0]
            try:
                seconds = getattr(self, "_" + what.lower().replace(" ", "_"))()
            except SlipError as error:  # refused before it came to that: too many connections, say
                self._tally.refuse()
                if "suspended" in str(error):  # for a wrong answer; the owner lets it in again
                    with contextlib.suppress(IdentityError):
                        self._devices.resume(self.name)
                elif "try again later" not in str(error) and "closed" not in str(error):
                    self._tally.problems.append(f"{what}: {error}")
            else:
                self._tally.record(what, seconds)

    def _connect(self, role: Role) -> Channel:
        return connect(self._address, self._context, role, self._digest, PATIENCE)[0]

    def _finish(self, channel: Channel, data: bytes) -> float | None:
        try:
            with contextlib.suppress(OSError):
                channel._sock.sendall(data)
            return _until_closed(channel)
        finally:
            channel.close()

    def _hello(self) -> float | None:
        sock = socket.create_connection(self._address, PATIENCE)
        channel = Channel(self._context.wrap_socket(sock, server_hostname="sliplm-trusted"), "it", PATIENCE)
        hello = frame(Kind.HELLO, 0, pack_hello(Hello(*VERSIONS, Role.REQUEST, self._digest)))
        return self._finish(channel, mutate(hello, self._rng))

    def _generate(self) -> float | None:
        return self._finish(
            self._connect(Role.REQUEST), mutate(frame(Kind.GENERATE, VERSION, _json(self._rng)), self._rng)
        )

    def _first_answer(self) -> float | None:
        """Speak before being asked: the server takes it for the answer to its first question."""
        m, _ = self._shapes[0]
        answer = self._rng.choice(
            (
                frame(Kind.RESULT, VERSION, bytes(4 * m), 0, 1, 1),
                frame(Kind.PONG, VERSION, b"", sequence=1),
                frame(Kind.ERROR, VERSION, b"no", 3),
            )
        )
        return self._finish(self._connect(Role.WORK), mutate(answer, self._rng))

    def _result(self) -> float | None:
        """Ask for text, and answer the first question that this causes with a malformed frame."""
        work = self._connect(Role.WORK)
        try:
            request = self._connect(Role.REQUEST)
        except SlipError:
            work.close()
            raise
        try:
            request.send(Kind.GENERATE, json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode())
            header = work.receive()
            payload = os.urandom(4 * header.rows * self._shapes[header.group][0])
            answer = frame(Kind.RESULT, VERSION, payload, header.group, header.rows, header.sequence)
            return self._finish(work, mutate(answer, self._rng))
        finally:
            work.close()
            request.close()


# --- a hostile trusted side -----------------------------------------------------------------------------------------


class HostileTrusted:
    """Welcomes edges, and sends them malformed frames."""

    def __init__(self, context: Any, digest: bytes, shapes: list[tuple[int, int]], tally: _Tally, seed: int) -> None:
        self._context, self._digest, self._shapes, self._tally = context, digest, shapes, tally
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        try:
            wrapped = self._context.wrap_socket(sock, server_side=True)
            if isinstance(self._context, plain.Context):
                wrapped.do_handshake()
            channel = Channel(wrapped, "the edge", PATIENCE)
        except OSError:
            sock.close()
            return
        try:
            hello = channel.read(channel.receive())
            welcome = pack_welcome(Welcome(VERSION, self._digest, "model"))
            if hello[6] == Role.WORK:
                self._work(channel, welcome)
            else:
                self._request(channel, welcome)
        except SlipError:
            pass
        finally:
            channel.close()

    def _work(self, channel: Channel, welcome: bytes) -> None:
        channel.send(Kind.WELCOME, welcome)
        channel.version = VERSION
        if self._tally.done:  # leave it in peace, so that it can be looked at
            channel.set_timeout(3600)
            channel.receive()
            return
        channel.send(Kind.PING, sequence=1)  # an edge that was asked nothing would wait longer every time
        channel.receive()
        if not self._tally.next():
            return
        rng = self._rng
        group = rng.randrange(len(self._shapes))
        rows = rng.randrange(1, 4)
        question = rng.choice(
            (
                frame(Kind.EXCHANGE, VERSION, os.urandom(4 * rows * self._shapes[group][1]), group, rows, 2),
                frame(Kind.PING, VERSION, b"", sequence=2),
                frame(Kind.ERROR, VERSION, b"no such thing", rng.randrange(len(Code))),
            )
        )
        with contextlib.suppress(OSError):
            channel._sock.sendall(mutate(question, rng))
        self._tally.record("EXCHANGE", _until_closed(channel))

    def _request(self, channel: Channel, welcome: bytes) -> None:
        rng = self._rng
        if not self._tally.next():
            return
        if rng.random() < 0.3:
            data, what = mutate(frame(Kind.WELCOME, 0, welcome), rng), "WELCOME"
        else:
            channel.send(Kind.WELCOME, welcome)
            channel.version = VERSION
            channel.read(channel.receive())
            text = json.dumps({"text": "x", "finish_reason": rng.choice((None, "stop"))}).encode()
            data, what = mutate(frame(rng.choice((Kind.TEXT, Kind.DONE)), VERSION, text), rng), "TEXT"
        with contextlib.suppress(OSError):
            channel._sock.sendall(data)
        self._tally.record(what, _until_closed(channel))


# --- the experiment -------------------------------------------------------------------------------------------------


def run(bundle: Path, size: int = 1_000_000, seed: int = 0, fresh: bool = True) -> dict[str, Any]:
    """Send `size` frames: to the trusted side and to the edge, with TLS and without."""
    encrypted = max(40, int(size * WITH_TLS))
    rest = max(40, int(size * TO_PROCESSES) - encrypted)
    parts: dict[str, Callable[[Site], dict[str, Any]]] = {
        "to slip trusted, TLS": lambda here: _attack_trusted(here, encrypted * 3 // 4, True, seed, fresh),
        "to slip edge, TLS": lambda here: _attack_edge(here, encrypted - encrypted * 3 // 4, True, seed, fresh),
        "to slip trusted, plain": lambda here: _attack_trusted(here, rest // 2, False, seed, fresh),
        "to slip edge, plain": lambda here: _attack_edge(here, rest - rest // 2, False, seed, fresh),
    }
    results: dict[str, Any] = {"in process": _attack_parsers(size - encrypted - rest, seed)}
    problems: list[str] = results["in process"].pop("problems")
    for name, part in parts.items():
        with site(bundle) as here:
            result = part(here)
        problems += [f"{name}: {p}" for p in result.pop("problems")]
        results[name] = result
    return {**results, "frames": sum(r["frames"] for r in results.values()), "problems": problems}


def _attack_parsers(size: int, seed: int) -> dict[str, Any]:
    """Whatever arrives is read, or refused with one of the errors that end a connection."""
    rng = random.Random(seed)
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    for _ in range(size):
        valid, version, decode = rng.choice(_READERS)(rng)
        data = mutate(valid, rng)
        near, far = socket.socketpair()
        with far:
            near.sendall(data)
            near.close()  # so that whoever wants more than was sent gets an end, and does not wait
            channel = Channel(far, "the other side", PATIENCE)  # type: ignore[arg-type]
            channel.version = version
            try:
                header = channel.receive()
                if header.kind in (Kind.EXCHANGE, Kind.RESULT):
                    if header.length <= MAX_JSON_BYTES:  # larger arrays are compared with the model's shapes first
                        channel.read_array(np.empty(header.length // 4, np.uint32))
                elif header.kind == Kind.ERROR:
                    channel.read_error(header)
                else:
                    decode(channel.read(header))
                outcomes["read"] += 1
            except SlipError as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:
                problems.append(f"{type(error).__name__} while reading {data[:64].hex()}: {error}")
                if len(problems) >= 10:
                    break
    seconds = round(time.monotonic() - started, 1)
    return {"frames": outcomes.total(), "outcomes": dict(outcomes), "seconds": seconds, "problems": problems}


_Reader = tuple[bytes, int, Callable[[bytes], object]]
_READERS: list[Callable[[random.Random], _Reader]] = [
    lambda rng: (frame(Kind.HELLO, 0, pack_hello(Hello(*VERSIONS, Role.WORK, rng.randbytes(32)))), 0, parse_hello),
    lambda rng: (frame(Kind.WELCOME, 0, pack_welcome(Welcome(VERSION, rng.randbytes(32), "model"))), 0, parse_welcome),
    lambda rng: (frame(Kind.GENERATE, VERSION, _json(rng)), VERSION, decode_request),
    lambda rng: (frame(Kind.TEXT, VERSION, b'{"text":"x","prompt_tokens":1}'), VERSION, decode_chunk),
    lambda rng: (
        frame(Kind.EXCHANGE, VERSION, rng.randbytes(48), rng.randrange(9), 3, rng.getrandbits(32)),
        VERSION,
        decode_chunk,
    ),
    lambda rng: (frame(Kind.ERROR, VERSION, rng.randbytes(20), rng.randrange(len(Code))), VERSION, decode_chunk),
    lambda rng: (frame(Kind.PONG, VERSION, b"", sequence=rng.getrandbits(32)), VERSION, decode_chunk),
]
"""A valid frame, the version agreed on, and what decodes its payload."""


def _attack_trusted(here: Site, size: int, encrypted: bool, seed: int, fresh: bool, hostile: int = 6) -> dict[str, Any]:
    bundle = EdgeBundle.open(here.bundle / "edge")
    trusted, address = here.trusted(before=None if encrypted else plain.server, fresh=fresh)
    honest = here.edge(address, here.enrol("honest"), before=None if encrypted else plain.client)
    api = honest.ready()["api"]
    truth = text(api, PROMPT, TOKENS)
    tally = _Tally(size)
    edges = [HostileEdge(here, address, encrypted, bundle, tally, seed + i) for i in range(hostile)]
    before, started = trusted.usage(), time.monotonic()
    for edge in edges:
        edge.start()
    asked = disturbed = 0
    while any(edge.is_alive() for edge in edges):
        asked += 1
        time.sleep(REST_SECONDS)
        try:
            disturbed += text(api, PROMPT, TOKENS) != truth
        except Exception as error:
            tally.problems.append(f"the honest edge was disturbed: {error}")
    if disturbed:
        tally.problems.append(f"the honest edge got a wrong text {disturbed} times")
    return _summary(tally, trusted, before, started) | {"honest requests meanwhile": asked}


def _attack_edge(here: Site, size: int, encrypted: bool, seed: int, fresh: bool, edges: int = 3) -> dict[str, Any]:
    bundle = EdgeBundle.open(here.bundle / "edge")
    identities = [here.enrol(f"edge{i}") for i in range(edges)]
    context = (
        tls.server_context(*authority.server_files(here.bundle / "trusted" / "authority"))
        if encrypted
        else plain.Context()
    )
    tally = _Tally(size)
    hostile = HostileTrusted(context, bundle.digest, bundle.shapes, tally, seed)
    running = [
        here.edge(hostile.address, i, before=None if encrypted else plain.client, fresh=fresh) for i in identities
    ]
    apis = [edge.ready()["api"] for edge in running]
    before, started = running[0].usage(), time.monotonic()
    clients = [threading.Thread(target=_annoy, args=(api, tally), daemon=True) for api in apis]
    for client in clients:
        client.start()
    while not tally.done and all(edge.alive for edge in running):
        time.sleep(0.1)
    for client in clients:
        client.join(60)
    for edge, api in zip(running, apis, strict=True):
        if not edge.alive:
            tally.problems.append(f"an edge ended: {edge.log.read_text()[-500:]}")
        else:
            eventually(lambda api=api: httpx.get(f"{api}/healthz", trust_env=False).raise_for_status(), PATIENCE)
    result = _summary(tally, running[0], before, started)
    hostile.close()
    return result


def _annoy(api: str, tally: _Tally) -> None:
    """Ask for text that the hostile trusted side does not give; the API has to say so in time."""
    with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
        while not tally.done:
            try:
                client.post(f"{api}/v1/completions", json={"prompt": "x", "max_tokens": 1})
            except httpx.HTTPError as error:
                tally.problems.append(f"the edge's API failed: {error}")
                return


def _summary(tally: _Tally, command: Command, before: dict[str, int], started: float) -> dict[str, Any]:
    seconds = time.monotonic() - started
    problems = tally.problems
    if not command.alive:
        return {"frames": tally.sent.total(), "problems": [*problems, f"it ended: {command.log.read_text()[-500:]}"]}
    with contextlib.suppress(AssertionError):
        eventually(functools.partial(_settled, command, before), PATIENCE, 0.5)
    after = command.usage()
    for what, allowed in ALLOWED.items():
        if after[what] > before[what] + allowed:
            problems.append(f"{what} grew from {before[what]} to {after[what]}")
    if complaints := command.complaints():
        problems.append(complaints[-2000:])
    return {
        "frames": tally.sent.total(),
        "by stage": dict(sorted(tally.sent.items())),
        "connections refused before": tally.refused,
        "longest until closed, seconds": round(tally.closed_after, 2),
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "problems": problems,
    }


def _settled(command: Command, before: dict[str, int]) -> None:
    now = command.usage()
    assert all(now[what] <= before[what] + allowed for what, allowed in ALLOWED.items())
