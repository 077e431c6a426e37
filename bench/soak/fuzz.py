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
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.soak import plain
from bench.soak.hostile_edge import PROMPT, HostileEdge
from bench.soak.hostile_trusted import HostileTrusted
from bench.soak.malformed import VERSION, frame, mutate, refused_request
from bench.soak.processes import Command, Site, eventually, site, text
from bench.soak.tally import PATIENCE, Tally
from sliplm.bundle import EdgeBundle
from sliplm.errors import Code, SlipError
from sliplm.protocol import tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import (
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
from sliplm.protocol.session import Session
from sliplm.registry import authority

TOKENS = 2

WITH_TLS, TO_PROCESSES = 0.01, 0.05
"""The shares of the frames that go over TLS, and to processes at all."""

ALLOWED = {"threads": 4, "descriptors": 8}
"""So many more than before may be left: of the honest edge, and of pools that grow once."""

REST_SECONDS = 0.2
"""The honest edge's pause between two requests."""


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
            channel = Channel(Session(far, plain.Context()), "the other side", PATIENCE)  # type: ignore[arg-type]
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
    lambda rng: (frame(Kind.GENERATE, VERSION, refused_request(rng)), VERSION, decode_request),
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
    tally = Tally(size)
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
        else plain.Context(server=True)
    )
    tally = Tally(size)
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


def _annoy(api: str, tally: Tally) -> None:
    """Ask for text that the hostile trusted side does not give; the API has to say so in time."""
    with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
        while not tally.done:
            try:
                client.post(f"{api}/v1/completions", json={"prompt": "x", "max_tokens": 1})
            except httpx.HTTPError as error:
                tally.problems.append(f"the edge's API failed: {error}")
                return


def _summary(tally: Tally, command: Command, before: dict[str, int], started: float) -> dict[str, Any]:
    seconds = time.monotonic() - started
    problems = tally.problems
    if not command.alive:
        return {"frames": tally.sent.total(), "problems": [*problems, f"it ended: {command.log.read_text()[-500:]}"]}
    with contextlib.suppress(AssertionError):
        eventually(functools.partial(_settled, command, before, tally), PATIENCE, 0.5)
    if tally.unsent:
        problems.append(f"{tally.unsent} frames were not sent")
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


def _settled(command: Command, before: dict[str, int], tally: Tally) -> None:
    assert not tally.unsent
    now = command.usage()
    assert all(now[what] <= before[what] + allowed for what, allowed in ALLOWED.items())
