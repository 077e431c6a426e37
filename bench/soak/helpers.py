"""Helpers that lie: every lie has to be caught, its helper suspended, and no request may notice.

Helpers of the real kind make pads, rightly up to a random batch, of which one or all images are wrong. Edges ask for
text all the time and have to get the true one every time: what was unmasked with a wrong image fails its check, the
helper is found out and suspended, its pads are dropped, and the exchange is repeated with a pad of the honest helper.
The owner then lets the liar in again, for the next lie.

Not every lie is used: a batch that comes when nobody lacks it any more goes nowhere, and what a suspended helper made
is dropped. So the trusted side's process logs which pads it used and which it found wrong (`watch`), and no wrong one
may be among the first and not among the second.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.soak import watch
from bench.soak.liar import NUMBERS, Undeterred
from bench.soak.processes import Site, site, text
from sliplm.bundle import EdgeBundle
from sliplm.edge.helper import HelperWorker
from sliplm.edge.multiplier import Multiplier
from sliplm.prg import expand
from sliplm.protocol.frames import PadsWanted

PROMPT = "Hello there"
TOKENS = 8
STOCK = 4
"""Few, so that a wrong pad is used soon."""

PATIENCE = 60.0
"""Seconds within which a liar is connected again."""

USED_SECONDS = 3.0
"""A liar whose lie has not been found within this time tells another."""

Field = NDArray[np.uint32]

LIES = [*NUMBERS, "of another key", "of the rows before"]


class Liar(Undeterred, HelperWorker):
    """Makes pads rightly, but for one batch in each life, which is wrong in the way that was last asked for.

    Attributes:
        told: the lies told: of each, what `watch` logs of the pads that it made wrong.
    """

    def __init__(self, engine: Multiplier, address: str, identity: Path, seed: int, key: bytes) -> None:
        super().__init__(engine, address, identity)
        self.told: list[list[bytes]] = []
        self._key = key
        self._rng = np.random.default_rng(seed)
        self._lie: tuple[str, int] | None = None
        self._past: dict[tuple[int, tuple[int, ...]], dict[str, Field]] = {}

    def lie(self, kind: str, after: int) -> None:
        """Let `after` batches be right, and the next one that allows it a lie of this kind."""
        self._lie = kind, after

    def _images(self, group: int, wanted: PadsWanted) -> Field:
        images = super()._images(group, wanted)
        wrong = self._wrong(group, wanted, images)
        past = self._past.setdefault((group, images.shape), {})
        past.setdefault("first", images)
        past["previous"] = images
        if wrong is None:
            return images
        self._lie = None
        pads = expand(wanted.key, wanted.first, wanted.rows, self._engine.shapes[group][1])
        self.told.append(watch.entries(self._key, pads[np.any(wrong != images, axis=1)]))
        return wrong

    def _wrong(self, group: int, wanted: PadsWanted, images: Field) -> Field | None:
        if self._lie is None:
            return None
        kind, after = self._lie
        if after > 0:
            self._lie = kind, after - 1
            return None
        columns = self._engine.shapes[group][1]
        if kind == "of another key":
            wrong = self._engine.product(group, expand(bytes(32), wanted.first, wanted.rows, columns))
        elif kind == "of the rows before":
            wrong = self._engine.product(group, expand(wanted.key, wanted.first + 1, wanted.rows, columns))
        else:
            past = dict(self._past.get((group, images.shape), {}))
            same = [p["previous"] for (g, s), p in self._past.items() if s == images.shape and g != group]
            if same:
                past["elsewhere"] = same[0]
            made = NUMBERS[kind](images, past, self._rng)
            if made is None:
                return None
            wrong = made
        return None if np.array_equal(wrong, images) else wrong


def run(bundle: Path, size: int = 10_000, liars: int = 3, clients: int = 2, seed: int = 0) -> dict[str, Any]:
    """Let `liars` helpers tell `size` lies in all, and say what came of them."""
    key = os.urandom(32)
    with site(bundle) as here:
        used, found = here.scratch / "used.log", here.scratch / "found.log"
        watched = functools.partial(_watch, used, found, key)
        trusted, address = here.trusted(0, "--pads", "helpers", "--stock", str(STOCK), before=watched)
        engine = Multiplier.from_bundle(EdgeBundle.open(here.bundle / "edge"))
        honest = HelperWorker(engine, address, here.enrol("honest", edge=False, helper=True))
        workers = [
            Liar(engine, address, here.enrol(f"liar{i}", edge=False, helper=True), seed + i, key) for i in range(liars)
        ]
        for worker in [honest, *workers]:
            threading.Thread(target=worker.run, daemon=True).start()
        apis = [here.edge(address, here.enrol(f"edge{i}")).ready()["api"] for i in range(clients)]
        truth = text(apis[0], PROMPT, TOKENS)
        counts = _Counts(size)
        started = time.monotonic()
        asking = [threading.Thread(target=_ask, args=(api, truth, counts)) for api in apis]
        lying = [
            threading.Thread(target=_lie, args=(here, f"liar{i}", worker, counts, len(engine.shapes), seed + i))
            for i, worker in enumerate(workers)
        ]
        for thread in [*asking, *lying]:
            thread.start()
        for thread in lying:
            thread.join()
        counts.over = True
        for thread in asking:
            thread.join()
        for worker in [honest, *workers]:
            worker.stop()
        problems = list(counts.problems)
        if here.registry.devices.get("honest").state != "active":
            problems.append("the honest helper was accused")
        if not trusted.alive:
            problems.append("the trusted side ended")
        if complaints := trusted.complaints():
            problems.append(complaints)
        told = [lie for worker in workers for lie in worker.told]
        were_used, were_found = (watch.read(log) for log in (used, found))
        in_use = [were_used.intersection(lie) for lie in told]
        if missed := sum(bool(wrong - were_found) for wrong in in_use):
            problems.append(f"{missed} lies were used and not found")
        return {
            "told": len(told),
            "used, in part at least": sum(map(bool, in_use)),
            "of them not found": missed,
            "helpers suspended for": dict(sorted(counts.caught.items())),
            "requests": counts.asked,
            "of them lost or wrong": counts.lost,
            "seconds": round(time.monotonic() - started, 1),
            "problems": problems,
        }


def _watch(used: Path, found: Path, key: bytes) -> None:
    watch.pads(used, key)
    watch.wrong(found, key)


class _Counts:
    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.left = size
        self.over = False
        self.caught: collections.Counter[str] = collections.Counter()
        self.asked = self.lost = 0
        self.problems: list[str] = []

    def next(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left >= 0 and len(self.problems) < 10


def _ask(api: str, truth: str, counts: _Counts) -> None:
    while not counts.over and len(counts.problems) < 10:
        try:
            got: str | Exception = text(api, PROMPT, TOKENS)
        except Exception as error:
            got = error
        with counts.lock:
            counts.asked += 1
            if got != truth:
                counts.lost += 1
                counts.problems.append(f"a request was lost or wrong: {got!s:.200}")


def _lie(here: Site, name: str, worker: Liar, counts: _Counts, groups: int, seed: int) -> None:
    rng = random.Random(seed)
    lives = 0
    while counts.next():
        deadline = time.monotonic() + PATIENCE
        while worker.counters.connections <= lives:  # what is told over the connection that is being cut is not used
            if time.monotonic() > deadline:
                counts.problems.append("a lying helper could not connect again")
                return
            time.sleep(0.01)
        lives = worker.counters.connections
        kind = rng.choice(LIES)
        told, deadline = len(worker.told), time.monotonic() + PATIENCE
        worker.lie(kind, rng.randrange(groups) if rng.random() < 0.2 else 0)
        again = time.monotonic() + USED_SECONDS
        while here.registry.devices.get(name).state != "suspended":
            if time.monotonic() > deadline:
                counts.problems.append(f"of {len(worker.told) - told} lies ({kind}) none was found")
                return
            if len(worker.told) > told and time.monotonic() > again:
                worker.lie(kind, 0)
                again = time.monotonic() + USED_SECONDS
            time.sleep(0.02)
        with counts.lock:
            counts.caught[kind] += 1
        here.registry.devices.resume(name)
