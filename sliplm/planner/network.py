"""A network that is not there: a proxy that delays every byte, and how long the round trip through it takes.

netem would emulate below TCP; a proxy runs everywhere, and has what a plan depends on, delay and bandwidth.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from sliplm.planner.costs import Network

PINGS = 30


@contextmanager
def emulated(target: str, network: Network) -> Iterator[str]:
    """The address under which `target` ("HOST:PORT") is reached over `network`; its own, if that changes nothing."""
    if network == Network():
        yield target
        return
    proxy = _Proxy(target, network)
    try:
        yield proxy.address
    finally:
        proxy.close()


def ping(network: Network) -> float:
    """Seconds that a byte takes there and back over the emulated `network`, beyond what it takes without."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer, args=(listener,), daemon=True).start()
        straight = "{}:{}".format(*listener.getsockname())
        with emulated(straight, network) as address:
            return max(0.0, _echo(address) - _echo(straight)) if address != straight else 0.0


class _Proxy:
    """Forwards connections to `target` over `network`, in a thread of its own. Its own address is `address`."""

    def __init__(self, target: str, network: Network) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port, self._network = int(port), network
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop)
        self._server = listening.result()
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    def close(self) -> None:
        """End all connections."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            writers.append(far_writer)
            for w in writers:
                w.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
        except (OSError, asyncio.CancelledError):  # one of the ends is gone, or the network: so is the other
            pass
        finally:
            for w in writers:
                w.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way, until its end has arrived."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.ensure_future(self._arrive(on_the_way, writer))
        try:
            free = 0.0  # when the wire has carried all before
            data = b"?"
            while data:
                data = await reader.read(1 << 16)
                free = max(free, self._loop.time()) + len(data) / self._network.bandwidth
                on_the_way.put_nowait((free + self._network.round_trip / 2, data))
            await arriving
        finally:
            arriving.cancel()

    async def _arrive(self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        data = b"?"
        while data:
            due, data = await on_the_way.get()
            if (wait := due - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            writer.write(data)
        writer.write_eof()


def _answer(listener: socket.socket) -> None:
    """Give back what comes over one connection after the other, until `listener` is closed."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := peer.recv(64):
                peer.sendall(data)


def _echo(address: str) -> float:
    """Median seconds of a byte to `address` and back."""
    host, port = address.rsplit(":", 1)
    taken = []
    with socket.create_connection((host, int(port))) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            begin = time.perf_counter()
            sock.sendall(b"x")
            sock.recv(1)
            taken.append(time.perf_counter() - begin)
    return median(taken)
