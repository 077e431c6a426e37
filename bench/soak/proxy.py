"""A TCP proxy that mistreats what passes through it, below TLS: what a bad network, or somebody on the way, can do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable

Fault = Callable[[bytes], "bytes | None"]
"""What becomes of a piece of a connection's traffic, in either direction; None cuts the connection."""


class Proxy:
    """Forwards connections to `target` ("HOST:PORT") from `address`. New connections get the fault that `make_fault`
    makes at that time, or none.

    Attributes:
        connections: how many were accepted so far.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.make_fault: Callable[[], Fault] | None = None
        self.connections = 0
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut all connections of this moment."""
        socks, self._socks = self._socks, []
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self.connections += 1
                try:
                    far = socket.create_connection(self._target, 10)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                fault = self.make_fault() if self.make_fault else None
                self._socks += [near, far]  # from now on, `cut` may close them at any time
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(a, b, fault), daemon=True).start()

    @staticmethod
    def _forward(a: socket.socket, b: socket.socket, fault: Fault | None) -> None:
        try:
            while data := a.recv(1 << 16):
                passed = fault(data) if fault else data
                if passed is None:
                    break
                b.sendall(passed)
        except OSError:
            pass
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _After:
    """Lets `count` bytes pass unharmed, then begins; `struck` says whether it has."""

    struck = False

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def __call__(self, data: bytes) -> bytes | None:
        with self._lock:
            begun = self._left <= 0
            self._left -= len(data)
        if begun:
            self.struck = True
        return self._harm(data) if begun else data

    def _harm(self, data: bytes) -> bytes | None:
        raise NotImplementedError


class Cut(_After):
    """The connection breaks."""

    def _harm(self, data: bytes) -> None:
        return None


class Truncate(_After):
    """Half of a piece arrives, and nothing more: the connection stays open and silent."""

    _silent = False

    def _harm(self, data: bytes) -> bytes:
        silent, self._silent = self._silent, True
        return b"" if silent else data[: len(data) // 2]


class Stall(_After):
    """Nothing arrives any more, and nobody says why."""

    def _harm(self, data: bytes) -> bytes:
        return b""


class Corrupt(_After):
    """One bit of every piece is flipped."""

    def _harm(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(changed)


class Reorder(_After):
    """The two halves of every piece change places."""

    def _harm(self, data: bytes) -> bytes:
        middle = (len(data) + 1) // 2
        return data[middle:] + data[:middle]


class Slow(_After):
    """Everything takes its time, and comes in small pieces, but it comes."""

    def __init__(self, count: int, seconds: float = 0.001) -> None:
        super().__init__(count)
        self._seconds = seconds

    def _harm(self, data: bytes) -> bytes:
        time.sleep(self._seconds)
        return data


FAULTS: dict[str, type[_After]] = {
    "cut": Cut,
    "truncated": Truncate,
    "stalled": Stall,
    "corrupted": Corrupt,
    "reordered": Reorder,
}
"""Those that a connection cannot survive."""
