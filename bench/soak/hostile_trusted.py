"""A trusted side that sends malformed frames."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from typing import Any

from bench.soak.malformed import VERSION, frame, mutate
from bench.soak.tally import PATIENCE, Tally, until_closed
from sliplm.errors import Code, LinkError, SlipError
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import Kind, Role, Welcome, pack_welcome
from sliplm.protocol.session import Session


class HostileTrusted:
    """Welcomes edges, and sends them malformed frames."""

    def __init__(self, context: Any, digest: bytes, shapes: list[tuple[int, int]], tally: Tally, seed: int) -> None:
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
            channel = Channel(Session(sock, self._context), "the edge", PATIENCE)
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
        self._finish(channel, mutate(question, rng), "EXCHANGE")

    def _request(self, channel: Channel, welcome: bytes) -> None:
        rng = self._rng
        if rng.random() < 0.3:
            data, what = mutate(frame(Kind.WELCOME, 0, welcome), rng), "WELCOME"
        else:
            channel.send(Kind.WELCOME, welcome)
            channel.version = VERSION
            channel.read(channel.receive())
            text = json.dumps({"text": "x", "finish_reason": rng.choice((None, "stop"))}).encode()
            data, what = mutate(frame(rng.choice((Kind.TEXT, Kind.DONE)), VERSION, text), rng), "TEXT"
        self._finish(channel, data, what)

    def _finish(self, channel: Channel, data: bytes, what: str) -> None:
        if self._tally.next():
            with contextlib.suppress(LinkError):
                channel._write(data)
            self._tally.record(what, until_closed(channel))
