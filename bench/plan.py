"""Whether `slip plan` is right: measure plans over an emulated network, and compare with what it predicts.

    python bench/plan.py [--rtt 0ms,5ms,20ms] [--plans all] [--model smollm2] [--planes 1] [--tokens 12] [--json]

The trusted side is `speed.runner`'s, the edge a real `slip edge`, on this machine; a TCP proxy between them delays
every byte by half the round trip in either direction, and holds the bandwidth. Its own delay is found with an echo
through it, as `ping` would find a network's, and is part of the round trip that the prediction gets; at 0ms there is no
proxy. The machine's speeds are probed before (`slip plan --probe`), so nothing else should run. netem would emulate
below TCP; the proxy runs everywhere, and it has what a plan depends on, delay and bandwidth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `slip trusted` has it

import msgspec
import transformers

from sliplm.planner import units
from sliplm.planner.costs import Network, Split
from sliplm.planner.predict import Work, predict
from sliplm.planner.probe import probe
from sliplm.planner.traced import trace
from sliplm.speed.models import find
from sliplm.speed.runner import PROMPT, Protected
from sliplm.split.model import Options, split_model


class Proxy:
    """Forwards connections to `target` ("HOST:PORT"), every byte `delay` seconds late and at most `bandwidth` of them a
    second each way. Its own address is `address`."""

    def __init__(self, target: str, delay: float, bandwidth: float) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port, self._delay, self._bandwidth = int(port), delay, bandwidth
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop)
        self._server = listening.result()
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        for w in (writer, far_writer):
            w.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await on_the_way.get()
                if (wait := due - self._loop.time()) > 0:
                    await asyncio.sleep(wait)
                writer.write(data)
                if not data:
                    writer.close()
                    return

        arriving = asyncio.ensure_future(arrive())
        free = 0.0  # when the wire has carried all before
        try:
            while True:
                data = await reader.read(1 << 16)
                free = max(free, self._loop.time()) + len(data) / self._bandwidth
                on_the_way.put_nowait((free + self._delay, data))
                if not data:
                    break
            await arriving
        except OSError:
            arriving.cancel()


@contextmanager
def network(target: str, round_trip: float, bandwidth: float) -> Iterator[str]:
    """The address under which `target` is reached over the emulated network."""
    if not round_trip and bandwidth == float("inf"):
        yield target
        return
    proxy = Proxy(target, round_trip / 2, bandwidth)
    try:
        yield proxy.address
    finally:
        proxy.close()


def ping(round_trip: float, bandwidth: float) -> float:
    """Seconds that a byte takes there and back over the emulated network, beyond what it takes without."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    while data := peer.recv(64):
                        peer.sendall(data)

        threading.Thread(target=echo, daemon=True).start()
        straight = "{}:{}".format(*listener.getsockname())
        with network(straight, round_trip, bandwidth) as address:
            return max(0.0, _echo(address) - _echo(straight)) if address != straight else 0.0


def _echo(address: str) -> float:
    host, port = address.rsplit(":", 1)
    taken = []
    with socket.create_connection((host, int(port))) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(30):
            begin = time.perf_counter()
            sock.sendall(b"x")
            sock.recv(1)
            taken.append(time.perf_counter() - begin)
    return median(taken)


def measure(directory: Path, round_trip: float, bandwidth: float, tokens: int, prompt: int) -> dict[str, float]:
    """Median seconds of a decoded token and of a prompt over the emulated network, and round trips of a token."""
    with ExitStack() as running:

        def way(target: str) -> str:
            return running.enter_context(network(target, round_trip, bandwidth))

        runner = Protected(directory, running, clocks=False, way=way)
        runner.decode(4)
        decoded = runner.decode(tokens)
        return {
            "seconds": median(decoded["seconds"]),
            "round_trips": decoded["spent"]["exchanges"],
            "first": min(runner.prefill(prompt)["seconds"] for _ in range(2)),  # the first finds no memory mapped
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for `slip bench`")
    parser.add_argument("--plans", default="all")
    parser.add_argument("--rtt", default="0ms,5ms,20ms", help="round-trip times, with commas between them")
    parser.add_argument("--bandwidth", help="such as 100Mbit; unlimited if absent")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="keep bundles here, and take them from here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    plans = units.plans(options.plans)
    bandwidth = units.bandwidth(options.bandwidth) if options.bandwidth else float("inf")
    speeds = probe()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="slip-plan-") as scratch:
        place = options.keep or Path(scratch)
        source = find(options.model, place)
        shape = trace(source)
        for plan in plans:
            directory = place / f"{options.model}-{plan}-planes{options.planes}".replace(":", "-")
            if not directory.exists():
                partly = {} if plan == "all" else {"plan": plan}
                split_model(source, directory, Options(16, options.planes, **partly), check=False)
            for text in options.rtt.split(","):
                round_trip = units.duration(text)
                real = ping(round_trip, bandwidth)
                measured = measure(directory, round_trip, bandwidth, options.tokens, options.prompt)
                (expected,) = predict(
                    shape, [plan], Work(prompt=max(PROMPT, options.prompt)), Split(16, options.planes), speeds,
                    Network(real, bandwidth),
                )  # fmt: skip
                row = {
                    "plan": plan,
                    "rtt": text,
                    "rtt_of_an_echo": real,
                    "round_trips": [expected.round_trips, measured["round_trips"]],
                    "token_seconds": [expected.seconds, measured["seconds"]],
                    "prompt_seconds": [expected.first, measured["first"]],
                    "predicted_over_measured": expected.seconds / measured["seconds"],
                    "prompt_predicted_over_measured": expected.first / measured["first"],
                }
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    if options.json:
        print(json.dumps({"speeds": msgspec.to_builtins(speeds), "rows": rows}))


if __name__ == "__main__":
    main()
