"""A helper: makes the images of one-time pads ahead of time, for edges of other parties.

It gets keys and no request's data; what it must not do is to share them with whoever runs the edges (docs/security.md).
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sliplm.bundle import EdgeBundle
from sliplm.edge.connection import Lent
from sliplm.edge.multiplier import Multiplier
from sliplm.errors import ProtocolError
from sliplm.prg import expand
from sliplm.protocol.channel import Channel
from sliplm.protocol.frames import MAX_ARRAY_BYTES, Header, Kind, PadsWanted, Role, parse_pads

AHEAD = 2
"""Jobs under way: one is computed while the images of the one before are sent."""


class HelperWorker(Lent):
    """Makes pads, see `Lent`."""

    role = Role.HELP

    def _serve(self, channel: Channel) -> bool:
        self._jobs: deque[tuple[Header, Future[NDArray[np.uint32]]]] = deque()
        with ThreadPoolExecutor(1, "images") as self._computing:
            return super()._serve(channel)

    def _answer(self, channel: Channel, header: Header) -> None:
        if header.kind != Kind.PADS:
            raise ProtocolError(f"the trusted side sent {Kind(header.kind).name} out of turn")
        wanted = parse_pads(channel.read(header))
        m, _ = self._shape(header.group)
        if 4 * wanted.rows * m > MAX_ARRAY_BYTES:
            raise ProtocolError(f"the trusted side asked for {wanted.rows} images of group {header.group} in one frame")
        self._jobs.append((header, self._computing.submit(self._images, header.group, wanted)))
        while self._jobs and (len(self._jobs) >= AHEAD or not channel.has_input()):
            self._send(channel, *self._jobs.popleft())

    def _images(self, group: int, wanted: PadsWanted) -> NDArray[np.uint32]:
        start = time.perf_counter_ns()
        r = expand(wanted.key, wanted.first, wanted.rows, self._engine.shapes[group][1])
        images = self._engine.product(group, r)
        self.counters.compute_ns += time.perf_counter_ns() - start
        return images

    def _send(self, channel: Channel, header: Header, made: Future[NDArray[np.uint32]]) -> None:
        images = made.result()
        staged = channel.stage(*images.shape)
        staged[:] = images
        channel.send_staged(Kind.IMAGES, header.group, header.sequence, staged)
        done = self.counters
        done.exchanges += 1
        done.rows += len(images)
        done.received_bytes += header.length
        done.sent_bytes += images.nbytes


class Helper(HelperWorker):
    """An edge bundle and a connection to its trusted side that makes pads: `run` serves until `stop`.

    Args:
        bundle: DIR/edge; or the bundle itself, whose digest may still be under way (`EdgeBundle.opening`).
        trusted: HOST:PORT of the trusted side, or the pair.
        identity: the file that `slip device add --helper` wrote.

    Raises:
        BundleError, IdentityError, LinkError: one of them is no good.
    """

    def __init__(self, bundle: Path | str | EdgeBundle, trusted: str | tuple[str, int], identity: Path | str) -> None:
        opening = bundle if isinstance(bundle, EdgeBundle) else EdgeBundle.opening(bundle)
        super().__init__(Multiplier.from_bundle(opening), trusted, identity)
