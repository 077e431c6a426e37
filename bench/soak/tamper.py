"""Tampered answers: every one has to be caught, and none may become text.

Edges of the real kind ask for text and answer rightly up to a random exchange, where they tell one lie of a random
kind. A lie counts as caught if the request goes on with another edge, to the true text, or fails, and all text that
came before is the beginning of the true text. Wrong numbers must also get the device suspended, for which it has to
fail the check; the owner then lets it in again, for the next lie. Meanwhile an honest edge asks all the time, and has
to get the true text every time.
"""

from __future__ import annotations

import collections
import random
import threading
import time
from pathlib import Path
from typing import Any

from bench.soak.liar import LIES, NUMBERS, Liar
from bench.soak.processes import Site, site, text
from sliplm.bundle import EdgeBundle
from sliplm.edge.multiplier import Multiplier

PROMPT = "Hello there"
TOKENS = 2


def eager() -> None:
    """Ask every edge in its turn, also one that has just failed: a liar needs opportunities."""
    from sliplm.exchange import edges

    edges.TRY_SECONDS = edges.TRY_TIMES = edges.AGAIN_SECONDS = 0


def run(bundle: Path, size: int = 10_000, liars: int = 4, seed: int = 0, fresh: bool = True) -> dict[str, Any]:
    """Let `liars` edges tell `size` lies in all, and say what came of them."""
    with site(bundle) as here:
        trusted, address = here.trusted(fresh=fresh, before=eager)
        honest = here.edge(address, here.enrol("honest"))
        api = honest.ready()["api"]
        truth = text(api, PROMPT, TOKENS)
        engine = Multiplier.from_bundle(EdgeBundle.open(here.bundle / "edge"))
        workers = [Liar(engine, address, here.enrol(f"liar{i}"), seed + i) for i in range(liars)]
        threads = [threading.Thread(target=w.run, daemon=True) for w in workers]
        for thread in threads:
            thread.start()
        tally = _Tally(size)
        before = trusted.usage()
        started = time.monotonic()
        clients = [
            threading.Thread(target=_lie, args=(here, f"liar{i}", w, tally, truth, len(engine.shapes), seed + i))
            for i, w in enumerate(workers)
        ]
        for client in clients:
            client.start()
        disturbed = asked = 0
        while any(client.is_alive() for client in clients):
            asked += 1
            time.sleep(0.2)
            try:
                disturbed += text(api, PROMPT, TOKENS) != truth
            except Exception:
                disturbed += 1
        seconds = time.monotonic() - started
        for worker in workers:
            worker.stop()
        after = trusted.usage()
        problems = list(tally.problems)
        if not trusted.alive:
            problems.append("the trusted side ended")
        if complaints := trusted.complaints():
            problems.append(complaints)
        if disturbed:
            problems.append(f"the honest edge was disturbed {disturbed} times")
        told = sum(w.told for w in workers)
        if told != tally.caught.total():
            problems.append(f"{told} lies were told, and {tally.caught.total()} caught")
        return {
            "told": told,
            "caught": dict(sorted(tally.caught.items())),
            "suspended for failing the check": tally.suspended,
            "honest requests": asked,
            "seconds": round(seconds, 1),
            "trusted before": before,
            "trusted after": after,
            "problems": problems,
        }


class _Tally:
    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._left = size
        self.caught: collections.Counter[str] = collections.Counter()
        self.suspended = 0
        self.problems: list[str] = []

    def next(self) -> bool:
        """Whether one more lie is to be told."""
        with self._lock:
            self._left -= 1
            return self._left >= 0 and len(self.problems) < 10

    def record(self, kind: str, error: Exception | None, right: bool, suspended: bool) -> None:
        with self._lock:
            if not right:
                self.problems.append(f"a lie ({kind}) was answered: {error or 'no error'}")
            elif suspended != (kind in NUMBERS):
                self.problems.append(f"a lie ({kind}): the device was {'' if suspended else 'not '}suspended: {error}")
            else:
                self.caught[kind] += 1
                self.suspended += suspended


def _lie(here: Site, name: str, worker: Liar, tally: _Tally, truth: str, groups: int, seed: int) -> None:
    rng = random.Random(seed)
    while tally.next():
        kind = rng.choice(LIES)
        told = worker.told
        for _ in range(20):  # until the lie finds an opportunity
            if not worker.connected.wait(30):
                tally.problems.append("a lying edge could not connect again")
                return
            worker.lie(kind, _moment(rng, groups) % (groups if kind == "rows swapped" else groups * TOKENS))
            got, error = worker.request(PROMPT, TOKENS)
            worker.lie(None)
            if worker.told > told:
                suspended = _suspended(here, name, kind in NUMBERS)
                # It may be the whole truth: an answer's last tokens can be bytes of no character, and have no text.
                tally.record(kind, error, got == truth or (error is not None and truth.startswith(got)), suspended)
                if suspended:
                    here.registry.devices.resume(name)
                break
            if error is None and got != truth:
                tally.problems.append("a request without a lie got another text")
                return
        else:
            tally.problems.append(f"there was no opportunity for a lie of the kind {kind!r}")
            return


def _suspended(here: Site, name: str, expected: bool) -> bool:
    """Whether the device is suspended; if that is expected, it may take a moment longer than the request's end."""
    deadline = time.monotonic() + 5
    while not (suspended := here.registry.devices.get(name).state == "suspended"):
        if not expected or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return suspended


def _moment(rng: random.Random, groups: int) -> int:
    """How many answers go before the lie: mostly few, which saves time, but any number may."""
    return rng.randrange(groups * TOKENS) if rng.random() < 0.25 else int(rng.expovariate(6 / groups))
