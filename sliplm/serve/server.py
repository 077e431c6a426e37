"""The trusted side's server: edges connect, lend their worker, and get text.

One thread per connection, and no event loop: a thread is either waiting for its peer, with a time limit, or
computing. What goes wrong on one connection ends that connection and no other. What a connection goes through is in
`greeting.py`, `links.py` and `requests.py`; what a request may do, and when it gets its turn, in `service.py`.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sliplm.errors import BusyError, IdentityError, LinkError, SlipError, locate
from sliplm.exchange.link import Shape
from sliplm.protocol import frames, tls
from sliplm.protocol.channel import Channel
from sliplm.protocol.connect import Address, tune
from sliplm.protocol.frames import Role
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import Device, Limits, authority
from sliplm.serve.connections import Connections, Known, cut
from sliplm.serve.greeting import greet, shake_hands
from sliplm.serve.helpers import Helpers, Work
from sliplm.serve.limits import DEFAULTS
from sliplm.serve.links import Links
from sliplm.serve.requests import LIE, LOG_BYTES, SHUTTING_DOWN, Requests
from sliplm.serve.rules import Rules
from sliplm.serve.service import Engine, Service
from sliplm.serve.watch import Watch

KEEPALIVE_SECONDS = 5.0
EXCHANGE_SECONDS = 30.0
WORKER_SECONDS = 5.0
CONTEXT_SECONDS = 86400.0
POLL_SECONDS = 0.2

_log = logging.getLogger(__name__)


class TrustedServer:
    """Serves `engine` on `host`:`port` (0: any free port, see `address`) to the devices enrolled in
    `directory`.

    `digest` and `shapes` ((M, K) per group) are those of the bundle. Strangers, who have not shown an enrolled
    certificate yet, are counted apart from devices: they cannot lock them out. Binds at once; `serve_forever` does
    the rest. `registry` is a URL as in `authority.open_registry`; `limits` hold for devices without their own; `rules`
    are the owner's; `pads` is what helpers work for, none if the trusted side makes its own. Raises LinkError if the
    address cannot be used, IdentityError if the authority is damaged, and RegistryError if the registry cannot be used.
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
        pads: Work | None = None,
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
        self._directory = Path(directory)
        self._connections = Connections(max_strangers, max_connections, max_workers, max_requests)
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
        self._watch = Watch(self._registry.devices, self._present, self._expel)
        self._links = Links(shapes, keepalive, exchange_timeout, worker_wait, self._stopping)
        self._requests = Requests(
            self.service, self._links, self._watch.suspend, lambda: self.draining, self._stopping, exchange_timeout
        )
        self.helpers = None
        if pads is not None:
            of_helpers = keepalive, exchange_timeout, self._stopping
            self.helpers = Helpers(list(shapes), pads, self._watch.suspend, *of_helpers)
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
        return len(self._connections.fingerprints())

    def links(self) -> list[RemoteLink]:
        """The live links of all devices, the newest of each device last."""
        return self._links.alive()

    def caught(self, link: RemoteLink) -> None:
        """Suspend the device whose `link` gave a wrong answer, if it was none of a request here."""
        self.service.metrics.verification_failures.inc()
        self._watch.suspend(self._links.device(link), LIE)

    def _finish_requests(self) -> None:
        """Wait for the running requests, while a drain has time left; those that wait for their turn are sent away."""
        self._listener.close()
        if self._drain_until is not None and not self._stopping.is_set():
            _log.info("stopping when %d running requests are done", self.service.queue.running)
        while self._drain_until is not None and time.monotonic() < self._drain_until:
            self.service.queue.refuse(BusyError(SHUTTING_DOWN))
            if not self._connections.requests() or self._stopping.wait(POLL_SECONDS):
                return

    def _shut_down(self) -> None:
        self._stopping.set()
        self._listener.close()
        self.service.queue.refuse(BusyError(SHUTTING_DOWN))
        connections = self._connections.all()
        self._links.close()
        if self.helpers:
            self.helpers.close()
        deadline = time.monotonic() + 2
        for thread in connections:
            thread.join(max(0.0, deadline - time.monotonic()))
        for sock in connections.values():
            cut(sock)
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
        self._connections.admit(thread, wrapped, address[0])
        try:
            thread.start()
        except RuntimeError:  # no more threads; those that end make room
            _log.warning("%s: refused, too many threads", where)
            self._connections.leave(thread)
            wrapped.close()

    def _connection(self, sock: ssl.SSLSocket, where: str) -> None:
        channel: Channel | None = None
        try:
            channel = shake_hands(sock)
            device, known = greet(
                channel,
                self._digest,
                self._engine.model_name,
                self._watch.admit,
                lambda device, role: self._identify(sock, device, role),
            )
            _log.info("%s: device %s connected (%s)", where, device.name, known.role.name)
            if known.role == Role.WORK:
                self._links.serve(channel, device)
            elif known.role == Role.HELP and self.helpers is not None:
                self.helpers.serve(channel, device)
            else:
                self._requests.serve(channel, device, known)
            _log.info("%s: device %s done (%s)", where, device.name, known.role.name)
        except SlipError as error:
            _log.warning("%s: %s", where, frames.clean(str(error), LOG_BYTES))
        except Exception as error:  # a fault of ours; the text of an unknown exception might hold anything
            _log.error("%s: internal error: %s", where, locate(error))
        finally:
            if channel is not None:
                channel.close(drain=True)
            sock.close()
            self._connections.leave(threading.current_thread())

    def _identify(self, sock: ssl.SSLSocket, device: Device, role: Role) -> Known:
        if role != Role.HELP:
            device.require_edge()
        elif self.helpers is None:
            raise LinkError("this trusted side makes its own one-time pads and takes no helpers (--pads helpers)")
        else:
            device.require_helper()
        return self._connections.identify(sock, device.fingerprint, role)

    def _present(self) -> set[str]:
        return self._connections.fingerprints() | (self.helpers.fingerprints() if self.helpers else set())

    def _expel(self, fingerprint: str, reason: IdentityError) -> None:
        """Cut a device off: its links end, so that its requests end and can say why."""
        self._connections.expel(fingerprint, reason)
        self._links.close(fingerprint)
        if self.helpers:
            self.helpers.close(fingerprint)
        self.service.queue.refuse(reason, fingerprint)


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
