"""An enrolled device that sends malformed frames."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from typing import Any

from bench.soak import plain
from bench.soak.malformed import VERSION, frame, mutate, refused_request
from bench.soak.processes import Site
from bench.soak.tally import PATIENCE, Tally, until_closed
from sliplm.bundle import EdgeBundle
from sliplm.errors import IdentityError, LinkError, SlipError
from sliplm.protocol import tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.connect import connect, parse_address
from sliplm.protocol.frames import VERSIONS, Hello, Kind, Role, pack_hello
from sliplm.protocol.session import Session

PROMPT = "The capital of France is"


class HostileEdge(threading.Thread):
    """An enrolled device that sends malformed frames at all stages of both conversations."""

    def __init__(self, here: Site, address: str, encrypted: bool, bundle: EdgeBundle, tally: Tally, seed: int) -> None:
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
            except Exception as error:  # of this experiment itself, which must not pass for want of frames
                self._tally.problems.append(f"{what} could not be sent: {error!r}")
            else:
                self._tally.record(what, seconds)

    def _connect(self, role: Role) -> Channel:
        return connect(self._address, self._context, role, self._digest, PATIENCE)[0]

    def _finish(self, channel: Channel, data: bytes) -> float | None:
        try:
            with contextlib.suppress(LinkError):
                channel._write(data)
            return until_closed(channel)
        finally:
            channel.close()

    def _hello(self) -> float | None:
        sock = socket.create_connection(self._address, PATIENCE)
        channel = Channel(Session(sock, self._context), "it", PATIENCE)
        hello = frame(Kind.HELLO, 0, pack_hello(Hello(*VERSIONS, Role.REQUEST, self._digest)))
        return self._finish(channel, mutate(hello, self._rng))

    def _generate(self) -> float | None:
        return self._finish(
            self._connect(Role.REQUEST), mutate(frame(Kind.GENERATE, VERSION, refused_request(self._rng)), self._rng)
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
