"""The trusted side's server: edges connect, lend their worker, and get text.

One thread per connection, and no event loop: a thread is either waiting for its peer, with a time limit, or
computing. What goes wrong on one connection ends that connection and no other. What a request may do, and when it gets
its turn, is `service.py`'s business.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

from sliplm.errors import (
    BusyError,
    Code,
    IdentityError,
    LinkError,
    NoWorkerError,
    ProtocolError,
    SlipError,
    VerificationError,
    locate,
)
from sliplm.exchange.link import Shape
from sliplm.protocol import frames, tls
from sliplm.protocol.channel import Address, Channel, check_digest, drain_socket, tune
from sliplm.protocol.frames import Kind, Role, Welcome
from sliplm.protocol.messages import Chunk, decode_request, encode
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import Device, Limits, authority
from sliplm.serve.limits import DEFAULTS
from sliplm.serve.rules import Rules
from sliplm.serve.service import Engine, Service
from sliplm.serve.watch import Watch

HANDSHAKE_SECONDS = 10.0
KEEPALIVE_SECONDS = 5.0
EXCHANGE_SECONDS = 30.0
WORKER_SECONDS = 5.0
CONTEXT_SECONDS = 86400.0
POLL_SECONDS = 0.2
CUT_SECONDS = 0.4
LOG_BYTES = 200
"""Errors may quote what a device sent: the log takes so much of it, on one line."""

SHUTTING_DOWN = "the trusted side is shutting down"
NO_WORKER = "this device has no worker connected: start `slip edge` on it, or try again soon"
_log = logging.getLogger(__name__)


class _Known:
    """A connection whose device is known; `reason` and `expelled` say why and since when it is being cut off."""

    def __init__(self, sock: ssl.SSLSocket, fingerprint: str, role: Role) -> None:
        self.sock, self.fingerprint, self.role = sock, fingerprint, role
        self.reason: IdentityError | None = None
        self.expelled = 0.0


class TrustedServer:
    """Serves `engine` on `host`:`port` (0: any free port, see `address`) to the devices enrolled in
    `directory`.

    `digest` and `shapes` ((M, K) per group) are those of the bundle. Strangers, who have not shown an enrolled
    certificate yet, are counted apart from devices: they cannot lock them out. Binds at once; `serve_forever` does
    the rest. `registry` is a URL as in `authority.open_registry`; `limits` hold for devices without their own; `rules`
    are the owner's. Raises LinkError if the address cannot be used, IdentityError if the authority is damaged, and
    RegistryError if the registry cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        digest: bytes,
        shapes: Sequence[Shape],
        directory: Path | str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        registry: str | None = None,
        limits: Limits = DEFAULTS,
        rules: Rules | None = None,
        keepalive: float = KEEPALIVE_SECONDS,
        exchange_timeout: float = EXCHANGE_SECONDS,
        worker_wait: float = WORKER_SECONDS,
        max_strangers: int = 64,
        max_connections: int = 512,
        max_workers: int = 8,
        max_requests: int = 128,
    ) -> None:
        self._engine = engine
        self._digest = digest
        self._shapes = list(shapes)
        self._directory = Path(directory)
        self._keepalive = keepalive
        self._exchange_timeout = exchange_timeout
        self._worker_wait = worker_wait
        self._max_strangers = max_strangers
        self._max_connections = max_connections
        self._max_workers = max_workers  # WORK connections of one device
        self._max_requests = max_requests  # of one device, those that wait included

        self._changed = threading.Condition()  # guards the three dicts below
        self._links: dict[str, list[RemoteLink]] = {}  # by device fingerprint, newest last
        self._strangers: dict[threading.Thread, tuple[ssl.SSLSocket, bytes]] = {}  # oldest first, with their network
        self._connections: dict[threading.Thread, _Known] = {}
        self._drain_until: float | None = None
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._serving: threading.Thread | None = None

        self._context = tls.server_context(*authority.server_files(directory))
        self._renew_at = time.monotonic() + CONTEXT_SECONDS
        self._listener = _listen(host, port)
        try:
            self._registry = authority.open_registry(directory, registry)
        except BaseException:
            self._listener.close()
            raise
        self.service = Service(engine, self._registry, limits, rules)
        self._watch = Watch(self._registry.devices, self._fingerprints, self._expel)
        bound = self._listener.getsockname()
        self.address: Address = (bound[0], bound[1])

    # --- running --------------------------------------------------------------------------------------------

    def serve_forever(self) -> None:
        """Accept connections until `close`, or until all requests are done after `drain`."""
        self._serving = threading.current_thread()
        self.service.meter.start()
        self._watch.start()
        _log.info("listening on %s:%d", *self.address)
        try:
            while not self._stopping.is_set() and self._drain_until is None:
                self._renew()
                try:
                    sock, address = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # the peer gave up already, or no descriptor is left: both pass
                    _log.warning("a connection could not be accepted: %s", error.strerror)
                    self._stopping.wait(POLL_SECONDS)
                    continue
                self._start(sock, address)
            self._finish_requests()
        finally:
            self._shut_down()

    def drain(self, seconds: float) -> None:
        """Stop, but let the requests that generate already go on for so long; `serve_forever` returns when they are
        done. Returns at once, and is safe in a signal handler."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + seconds

    def close(self) -> None:
        """Stop serving and end all connections; running requests get an ERROR. Safe in a signal handler,
        where it returns at once, and `serve_forever` then does the work."""
        self._stopping.set()
        if self._serving is None:
            self._shut_down()
        elif self._serving is not threading.current_thread():
            self._stopped.wait(10)

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now, if its device has a worker."""
        serving = self._serving is not None and not self._stopping.is_set() and self._drain_until is None
        return serving and self._watch.healthy and self.service.meter.healthy

    @property
    def devices_connected(self) -> int:
        return len(self._fingerprints())

    def links(self) -> list[RemoteLink]:
        """The live links of all devices, the newest of each device last."""
        with self._changed:
            return [link for group in self._links.values() for link in group if link.alive]

    def _finish_requests(self) -> None:
        """Wait for the running requests, while a drain has time left; those that wait for their turn are sent away."""
        self._listener.close()
        if self._drain_until is not None and not self._stopping.is_set():
            _log.info("stopping when %d running requests are done", self.service.queue.running)
        while self._drain_until is not None and time.monotonic() < self._drain_until:
            self.service.queue.refuse(BusyError(SHUTTING_DOWN))
            with self._changed:
                busy = any(c.role == Role.REQUEST for c in self._connections.values())
            if not busy or self._stopping.wait(POLL_SECONDS):
                return

    def _shut_down(self) -> None:
        self._stopping.set()
        self._listener.close()
        self.service.queue.refuse(BusyError(SHUTTING_DOWN))
        with self._changed:
            connections = {t: sock for t, (sock, _) in self._strangers.items()}
            connections |= {t: known.sock for t, known in self._connections.items()}
            self._changed.notify_all()
        for link in self.links():  # this makes the generations that use it fail, and they say why
            link.close()
        deadline = time.monotonic() + 2
        for thread in connections:
            thread.join(max(0.0, deadline - time.monotonic()))
        for sock in connections.values():
            _cut(sock)
        for thread in connections:
            thread.join(0.5)
        self._watch.close()
        self.service.meter.close()
        self._registry.close()
        _log.info("stopped")
        self._stopped.set()

    def _renew(self) -> None:
        """Take up a renewed certificate, in a process that outlives it."""
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + CONTEXT_SECONDS
        try:
            self._context = tls.server_context(*authority.server_files(self._directory))
        except IdentityError as error:
            _log.error("the server's certificate could not be renewed: %s", error)

    # --- one connection -------------------------------------------------------------------------------------

    def _start(self, sock: socket.socket, address: Address) -> None:
        where = f"{address[0]}:{address[1]}"
        try:
            tune(sock)
            wrapped = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):
            _log.warning("%s: the peer left at once", where)
            sock.close()
            return
        thread = threading.Thread(target=self._connection, args=(wrapped, where), name=f"slip {where}", daemon=True)
        with self._changed:
            if len(self._strangers) >= self._max_strangers:
                self._evict()
            self._strangers[thread] = (wrapped, _network(address[0]))
        try:
            thread.start()
        except RuntimeError:  # no more threads; those that end make room
            _log.warning("%s: refused, too many threads", where)
            with self._changed:
                del self._strangers[thread]
            wrapped.close()

    def _evict(self) -> None:
        """Cut the oldest stranger of the network that has most: whoever floods the server evicts itself."""
        busiest, _ = Counter(network for _, network in self._strangers.values()).most_common(1)[0]
        thread = next(t for t, (_, network) in self._strangers.items() if network == busiest)
        _cut(self._strangers.pop(thread)[0])

    def _connection(self, sock: ssl.SSLSocket, where: str) -> None:
        channel: Channel | None = None
        try:
            self._handshake(sock)
            channel = Channel(sock, "the edge", HANDSHAKE_SECONDS)
            device, role = self._greet(channel, sock)
            _log.info("%s: device %s connected (%s)", where, device.name, role.name)
            with self._changed:
                known = self._connections[threading.current_thread()]
            if role == Role.WORK:
                self._work(channel, device)
            else:
                self._request(channel, device, known)
            _log.info("%s: device %s done (%s)", where, device.name, role.name)
        except SlipError as error:
            _log.warning("%s: %s", where, frames.clean(str(error), LOG_BYTES))
        except Exception as error:  # a fault of ours; the text of an unknown exception might hold anything
            _log.error("%s: internal error: %s", where, locate(error))
        finally:
            if channel is not None:
                channel.close(drain=True)
            sock.close()
            with self._changed:
                self._strangers.pop(threading.current_thread(), None)
                self._connections.pop(threading.current_thread(), None)

    def _handshake(self, sock: ssl.SSLSocket) -> None:
        try:
            sock.settimeout(HANDSHAKE_SECONDS)
            sock.do_handshake()
        except (OSError, ValueError) as error:
            drain_socket(sock)  # so that the alert arrives, which tells the edge what is wrong
            if isinstance(error, ssl.SSLError):
                raise tls.explain(error, "the edge") from None
            raise LinkError("the peer did not complete the handshake") from None

    def _greet(self, channel: Channel, sock: ssl.SSLSocket) -> tuple[Device, Role]:
        """HELLO and WELCOME; who this is and what for. A refusal is sent to the edge, and raised here."""
        try:
            header = channel.receive()
            if header.kind != Kind.HELLO:
                raise ProtocolError("the edge did not start with HELLO")
            payload = channel.read(header)
            hello = frames.parse_hello(payload)
            version = frames.choose_version(hello)
            device = self._watch.admit(authority.fingerprint(channel.certificate()))
            check_digest(self._digest, hello.digest)
            self._identify(_Known(sock, device.fingerprint, hello.role))
        except Exception as error:  # without a word, the edge would take it for a broken connection
            with contextlib.suppress(LinkError):
                channel.tell(error)
            raise
        channel.send(Kind.WELCOME, frames.pack_welcome(Welcome(version, self._digest, self._engine.model_name())))
        channel.version = version
        return device, hello.role

    def _identify(self, known: _Known) -> None:
        """Count this connection as its device's; no device may take all of them."""
        me = threading.current_thread()
        with self._changed:
            mine = [c.role for c in self._connections.values() if c.fingerprint == known.fingerprint]
            if known.role == Role.WORK and mine.count(Role.WORK) >= self._max_workers:
                raise BusyError(f"this device has {self._max_workers} workers connected already: try again later")
            if known.role == Role.REQUEST and mine.count(Role.REQUEST) >= self._max_requests:
                raise BusyError(f"this device has {self._max_requests} requests running or waiting: try again later")
            free = self._max_connections - len(self._connections)
            # Those that have many leave half of the rest to others, so that a few cannot take all.
            if not free or len(mine) >= max(self._max_workers, free // 2):
                raise BusyError("the trusted side has too many connections: try again later")
            if self._strangers.pop(me, None) is None:
                raise BusyError("the trusted side gave this connection up: try again later")
            self._connections[me] = known

    # --- devices that may not stay ------------------------------------------------------------------------------

    def _fingerprints(self) -> set[str]:
        with self._changed:
            return {known.fingerprint for known in self._connections.values()}

    def _expel(self, fingerprint: str, reason: IdentityError) -> None:
        """Cut a device off: its links end, so that its requests end and can say why. Those that did not within
        CUT_SECONDS, because their peer does not read, are cut by the next call."""
        with self._changed:
            mine = [known for known in self._connections.values() if known.fingerprint == fingerprint]
            links = list(self._links.get(fingerprint, ()))
        for known in mine:
            if known.reason is None:
                known.reason, known.expelled = reason, time.monotonic()
            elif time.monotonic() - known.expelled > CUT_SECONDS:
                _cut(known.sock)
        for link in links:
            link.close()
        self.service.queue.refuse(reason, fingerprint)

    # --- WORK -----------------------------------------------------------------------------------------------

    def _work(self, channel: Channel, device: Device) -> None:
        """Keep the link alive until it ends. The exchanges come from other threads."""
        link = RemoteLink(channel, self._shapes, self._exchange_timeout)
        with self._changed:
            self._links.setdefault(device.fingerprint, []).append(link)
            self._changed.notify_all()
        try:
            while not link.wait_closed(self._keepalive) and not self._stopping.is_set():
                if time.monotonic() - link.last_used > self._keepalive / 2:
                    link.ping()
        finally:
            with self._changed:
                self._links[device.fingerprint].remove(link)
                if not self._links[device.fingerprint]:
                    del self._links[device.fingerprint]
            link.close()

    def _claim(self, device: Device) -> RemoteLink:
        """The device's newest link that answers. Raises LinkError if none turns up in time."""
        deadline = time.monotonic() + self._worker_wait
        while True:
            with self._changed:
                while not (alive := [k for k in self._links.get(device.fingerprint, ()) if k.alive]):
                    left = deadline - time.monotonic()
                    if left <= 0 or self._stopping.is_set():
                        raise NoWorkerError(NO_WORKER)
                    self._changed.wait(left)
            link = alive[-1]
            try:
                if time.monotonic() - link.last_used > 1.0:
                    link.ping()  # an edge that lost its power would otherwise cost the request a long wait
            except LinkError:
                continue
            return link

    # --- REQUEST --------------------------------------------------------------------------------------------

    def _request(self, channel: Channel, device: Device, known: _Known) -> None:
        header = channel.receive()
        if header.kind != Kind.GENERATE:
            raise ProtocolError("the edge did not follow HELLO with GENERATE")
        channel.set_timeout(self._exchange_timeout)
        link: RemoteLink | None = None

        def claim() -> RemoteLink:
            nonlocal link
            link = self._claim(device)
            return link

        try:
            if self._drain_until is not None:
                raise BusyError(SHUTTING_DOWN)
            request = decode_request(channel.read(header))
            self._send(channel, self.service.answer(request, device, claim))
        except _PeerGone:
            _log.info("device %s cancelled its request", device.name)
        except Exception as error:
            if isinstance(error, VerificationError):
                self.service.metrics.verification_failures.inc()
                if link is not None:
                    link.close()
                self._watch.suspend(device, "an answer of this device failed its check")
            elif known.reason is not None:
                error = known.reason
            # Layer names and the like are not for the edge, whatever the exception says.
            expected = isinstance(error, SlipError)
            why = frames.clean(str(error), LOG_BYTES) if expected else f"internal error: {locate(error)}"
            _log.warning("device %s: %s", device.name, why)
            if isinstance(error, SlipError) and error.code == Code.FAILED and not error.told:
                error = LinkError(f"generation stopped: {SHUTTING_DOWN if self._stopping.is_set() else error}")
            channel.tell(error)

    def _send(self, channel: Channel, chunks: Generator[Chunk, None, None]) -> None:
        with contextlib.closing(chunks):
            for chunk in chunks:
                if self._stopping.is_set():
                    chunks.throw(LinkError(SHUTTING_DOWN))
                try:
                    if channel.peer_left():
                        raise _PeerGone
                    channel.send(Kind.TEXT if chunk.finish_reason is None else Kind.DONE, encode(chunk))
                except LinkError:
                    raise _PeerGone from None


class _PeerGone(Exception):
    """The requester closed its connection: nobody is left to tell."""


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, UnicodeError, OverflowError):
        raise LinkError(f"{host}:{port} is not an address of this machine") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.settimeout(POLL_SECONDS)
    except OSError as error:
        listener.close()
        raise LinkError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from None
    return listener


def _cut(sock: ssl.SSLSocket) -> None:
    """End a connection under the thread that waits on it (see Channel.abort)."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _network(host: str) -> bytes:
    """What one party usually has for itself: an IPv4 address, or an IPv6 /64."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.packed
    return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:8]
