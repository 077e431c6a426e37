"""How long one exchange takes on this machine: RemoteLink to a worker process over loopback TLS, no products.

    python bench/link.py [--cols 2048] [--rows 1 32 512] [--rounds 5000] [--json]

The edge sends its input back, so all that is timed is TLS, the sockets and Python on both sides. Beside it,
the same bytes over a bare ssl socket of Python's: what the link itself adds is the difference. Where the scheduler puts
the two processes matters as much: `taskset -c 1` in front puts them on one core. Last, TLS alone, through memory
in this process: what a megabyte costs to seal and to open, with our OpenSSL and with Python's.
"""

import argparse
import contextlib
import json
import multiprocessing
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sliplm.edge.multiplier import Multiplier
from sliplm.edge.worker import EdgeWorker
from sliplm.field import P
from sliplm.protocol import tls
from sliplm.protocol.openssl import Room, Tls
from sliplm.registry import authority
from sliplm.serve.server import TrustedServer

DIGEST = bytes(32)


class Mirror:
    """An IntMatrix that multiplies by one."""

    nbytes = 0

    def __init__(self, cols: int) -> None:
        self.rows = self.cols = cols

    def product(self, x, *, out=None, threads=0):
        out[:] = x
        return out


class Silent:
    capacity = 1
    shows = False

    def generate(self, request, link):
        yield from ()

    def model_name(self) -> str:
        return "none"


def work(cols: int, address: tuple[str, int], identity: Path) -> None:
    EdgeWorker(Multiplier([Mirror(cols)], DIGEST), address, identity).run()


def read(sock: socket.socket, view: memoryview) -> bool:
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            return False
        done += count
    return True


def bare(side: int, chain: Path, ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(chain)
    context.load_verify_locations(cadata=ca_pem.decode())
    return context


def bare_client(identity: Path) -> ssl.SSLContext:
    _, begin, rest = identity.read_bytes().rpartition(b"-----BEGIN")  # the authority's certificate is the last
    return bare(ssl.PROTOCOL_TLS_CLIENT, identity, begin + rest)


def echo(address: tuple[str, int], identity: Path, sizes: list[int]) -> None:
    raw = socket.create_connection(address)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock = bare_client(identity).wrap_socket(raw, server_hostname=tls.SERVER_NAME)
    for size in sizes:
        data = memoryview(bytearray(size))
        while read(sock, data):
            sock.sendall(data)
            if data[0]:  # the last round of this size
                break


class Ours:
    """Two ends of a TLS session, by `protocol.openssl`."""

    def __init__(self, home: Path, identity: Path) -> None:
        self.here = tls.server_context(*authority.server_files(home)).session()
        self.there = tls.client_context(identity).session()
        for _ in range(2):
            for end, other in ((self.there, self.here), (self.here, self.there)):
                end.handshake()
                self._receive(other, end.seal())

    def _receive(self, end: Tls, sealed: memoryview) -> None:
        end.room = end.room if len(sealed) <= len(end.room.view) else Room(len(sealed))
        end.room.view[: len(sealed)] = sealed  # as a socket would
        end.receive(end.room.start, len(sealed))

    def seal(self, data: memoryview) -> memoryview:
        return self.there.seal(data)

    def open(self, sealed: memoryview, into: memoryview) -> None:
        self._receive(self.here, sealed)
        assert self.here.read(into) == len(into)


class Pythons:
    """The same by `ssl`."""

    def __init__(self, home: Path, identity: Path) -> None:
        self.here_in, self.there_out, back = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
        server = bare(ssl.PROTOCOL_TLS_SERVER, *authority.server_files(home))
        self.here = server.wrap_bio(self.here_in, back, server_side=True)
        self.there = bare_client(identity).wrap_bio(back, self.there_out, server_hostname=tls.SERVER_NAME)
        for end in (self.there, self.here, self.there, self.here):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            self.here_in.write(self.there_out.read())

    def seal(self, data: memoryview) -> bytes:
        self.there.write(data)
        return self.there_out.read()

    def open(self, sealed: bytes, into: memoryview) -> None:
        self.here_in.write(sealed)
        done = 0
        while done < len(into):
            done += self.here.read(len(into) - done, into[done:])


def time_memory(ends: dict[str, Ours | Pythons], size: int = 1 << 17) -> list[dict[str, object]]:
    """Milliseconds of this process a megabyte, in pieces of `size` bytes, by turns: medians."""
    data, into = memoryview(bytes(size)), memoryview(bytearray(size))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ends}
    for _ in range(1000):
        for name, pair in ends.items():
            times = [time.process_time()]
            sealed = pair.seal(data)
            times.append(time.process_time())
            pair.open(sealed, into)
            times.append(time.process_time())
            spent[name].append((times[1] - times[0], times[2] - times[1]))
    scale = 1e3 * (1 << 20) / size
    medians = {
        name: [scale * statistics.median(some) for some in zip(*each, strict=True)] for name, each in spent.items()
    }
    return [{"what": f"in memory, {name}", "seal_ms": a, "open_ms": b} for name, (a, b) in medians.items()]


def time_rounds(step: Callable[[bool], object], rounds: int) -> dict[str, float]:
    times = []
    for i in range(rounds + rounds // 5 + 1):
        start = time.perf_counter()
        step(i == rounds + rounds // 5)
        times.append((time.perf_counter() - start) * 1e6)
    kept = times[rounds // 5 :]  # the first fifth warms up
    return {"median_us": statistics.median(kept), "p10_us": statistics.quantiles(kept, n=10)[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    plan = [(rows, max(20, args.rounds // rows)) for rows in args.rows]
    spawn = multiprocessing.get_context("spawn")
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        home, identity = Path(tmp) / "authority", Path(tmp) / "identity.pem"
        authority.add_device(home, "bench", identity)

        server = TrustedServer(Silent(), DIGEST, [(args.cols, args.cols)], home)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        edge = spawn.Process(target=work, args=(args.cols, server.address, identity), daemon=True)
        edge.start()
        while not server.links():
            time.sleep(0.01)
        link = server.links()[0]
        rng = np.random.default_rng()
        for rows, rounds in plan:
            x = rng.integers(0, P, (rows, args.cols)).astype(np.uint32)
            took = time_rounds(lambda _, x=x: link.exchange(0, x, lambda: None), rounds)
            results.append({"what": "link", "rows": rows, "bytes": x.nbytes, **took})
        edge.terminate()
        server.close()

        sizes = [16 + 4 * rows * args.cols for rows, _ in plan]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            mirror = spawn.Process(target=echo, args=(listener.getsockname(), identity, sizes), daemon=True)
            mirror.start()
            raw, _ = listener.accept()
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            own = bare(ssl.PROTOCOL_TLS_SERVER, *authority.server_files(home))
            with own.wrap_socket(raw, server_side=True) as sock:
                for (rows, rounds), size in zip(plan, sizes, strict=True):
                    data = memoryview(bytearray(size))

                    def once(last: bool, sock=sock, data=data) -> None:
                        data[0] = last
                        sock.sendall(data)
                        read(sock, data)

                    results.append({"what": "bare ssl", "rows": rows, "bytes": size, **time_rounds(once, rounds)})
            mirror.join(10)
        memory = time_memory({"ours": Ours(home, identity), ssl.OPENSSL_VERSION: Pythons(home, identity)})
    if args.json:
        print(json.dumps(results + memory))
        return
    for r in results:
        print(f"{r['what']:9} {r['rows']:5} rows {r['bytes'] / 1024:8.0f} KiB each way"
              f"  median {r['median_us']:9.1f} us  p10 {r['p10_us']:9.1f} us")  # fmt: skip
    for r in memory:
        print(f"{r['what']}: {r['seal_ms']:.2f} ms to seal a megabyte, {r['open_ms']:.2f} ms to open it")


if __name__ == "__main__":
    main()
