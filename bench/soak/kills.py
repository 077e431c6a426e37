"""kill -9 of any side at random moments, with requests under way.

The killed side is started again, the other is left alone: within 5 s of the moment at which the restarted side is up,
every edge has to answer a new request, with the right text. The death of a helper, of which there are two, may break
no request off. Texts that break off have to break off with an error. All
pads, of all lives of the trusted side, are logged (`watch`), and none may come twice. In the end, every request that
gave text has one usage record, closed, with the tokens of the whole text if the request came to its end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sqlite3
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.soak import watch
from bench.soak.processes import Command, Site, ask, site
from sliplm.protocol.messages import Chunk

PROMPT = "The capital of France is"
TOKENS = 8
RECOVERY_SECONDS = 5.0
SWEEP_SECONDS = 40.0
"""Within this time a trusted side has closed what its predecessor left open."""


class Client(threading.Thread):
    """Asks one edge again and again, and judges what it gets.

    Attributes:
        asked, begun, finished, broken: how many requests were made, gave text, gave all of it, ended with an error.
    """

    def __init__(self, truth: str) -> None:
        super().__init__(daemon=True)
        self.api = ""
        self.truth = truth
        self.asked = self.begun = self.finished = self.broken = 0
        self.asked_at = 0.0
        self.problems: list[str] = []
        self.errors: dict[str, int] = {}
        self._first = threading.Condition()
        self._stopping = False

    def run(self) -> None:
        while not self._stopping:
            text, asked_at = "", time.monotonic()
            self.asked += 1
            try:
                for chunk in ask(self.api, PROMPT, TOKENS, timeout=60):
                    if chunk.text and not text:
                        with self._first:
                            self.begun += 1
                            self.asked_at = asked_at
                            self._first.notify_all()
                    text += chunk.text
                if text != self.truth:
                    self.problems.append(f"a text that passed for whole is wrong: {len(text)} characters")
                self.finished += 1
            except Exception as error:
                self.broken += 1
                sentence = str(error)
                self.errors[sentence] = self.errors.get(sentence, 0) + 1
                if not self.truth.startswith(text):
                    self.problems.append("a text that broke off was wrong before")
                time.sleep(0.05)

    def wait_for_a_new_answer(self, since: float, seconds: float) -> bool:
        """Whether a request made after `since` gives its first text within `seconds`."""
        with self._first:
            return self._first.wait_for(lambda: self.asked_at >= since, seconds)

    def stop(self) -> None:
        self._stopping = True
        self.join(60)


def run(bundle: Path, size: int = 200, edges: int = 2, seed: int = 0) -> dict[str, Any]:
    """Kill the trusted side, an edge or a helper, `size` times in all."""
    rng = random.Random(seed)
    key = os.urandom(32)
    with site(bundle) as here:
        pads, rows = here.scratch / "pads.log", here.scratch / "rows.log"
        watched = functools.partial(watch.pads, pads, key)
        trusted, address = here.trusted(0, "--pads", "helpers", before=watched)
        port = int(address.rsplit(":", 1)[1])
        identities = [here.enrol(f"edge{i}") for i in range(edges)]
        makers = [here.enrol(f"helper{i}", edge=False, helper=True) for i in range(2)]
        helpers = [here.helper(address, maker) for maker in makers]
        for helper in helpers:
            helper.ready()
        running = [_edge(here, address, identity, rows, key) for identity in identities]
        apis = [edge.ready()["api"] for edge in running]
        first = list(ask(apis[0], PROMPT, TOKENS))
        truth = "".join(c.text for c in first)
        clients = [Client(truth) for _ in running]
        for client, api in zip(clients, apis, strict=True):
            client.api = api
            client.start()
        problems: list[str] = []
        took: dict[str, list[float]] = {"trusted": [], "edge": [], "helper": []}
        started = time.monotonic()
        for number in range(size):
            time.sleep(rng.expovariate(1.0))
            side, victim = rng.choice(list(took)), rng.randrange(edges)
            broken = [client.broken for client in clients]
            if side == "trusted":
                trusted.kill()
                trusted, _ = here.trusted(port, "--pads", "helpers", before=watched)
                waiting = clients
            elif side == "helper":
                helpers[victim % 2].kill()
                helpers[victim % 2] = here.helper(address, makers[victim % 2])
                helpers[victim % 2].ready()
                waiting = clients
            else:
                running[victim].kill()
                running[victim] = _edge(here, address, identities[victim], rows, key)
                clients[victim].api = running[victim].ready()["api"]
                waiting = [clients[victim]]
            up = time.monotonic()
            for client in waiting:
                if not client.wait_for_a_new_answer(up, 60):
                    problems.append(f"kill {number} ({side}): no new answer within 60 s")
            seconds = time.monotonic() - up
            took[side].append(seconds)
            if seconds > RECOVERY_SECONDS:
                problems.append(f"kill {number} ({side}): the first new answer took {seconds:.1f} s")
            spared = [] if side == "trusted" else [c for c in clients if side == "helper" or c not in waiting]
            if any(c.broken > b for c, b in zip(clients, broken, strict=True) if c in spared):
                problems.append(f"kill {number} ({side}): somebody else's request broke off")
            if len(problems) > 10:
                break
        for client in clients:
            client.stop()
        for client in clients:
            problems += client.problems
            if client.is_alive():
                problems.append("a request hangs")
        for command in here.commands:
            if complaints := command.complaints():
                problems.append(complaints)
        usage, wrong = _usage(here, first[-1], clients, edges * len(took["trusted"]))
        problems += wrong
        used, twice = watch.count(pads)
        seen, seen_twice = watch.count(rows)
        if twice or seen_twice:
            problems.append(f"{twice} pads were used twice; {seen_twice} rows were seen twice")
        if seen > used:
            problems.append(f"the edges saw {seen} rows and only {used} pads were logged")
        return {
            "kills": {side: len(times) for side, times in took.items()},
            "recovery, seconds": {side: _summary(times) for side, times in took.items() if times},
            "requests": {"whole": sum(c.finished for c in clients), "broken off": sum(c.broken for c in clients)},
            "usage records": usage,
            "pads used": used,
            "of them twice": twice,
            "rows seen by edges": seen,
            "rows seen twice": seen_twice,
            "seconds": round(time.monotonic() - started, 1),
            "problems": problems,
        }


def _usage(here: Site, whole: Chunk, clients: list[Client], torn: int) -> tuple[dict[str, int], list[str]]:
    """The usage records by outcome, and what is wrong with them. `torn` requests, at most, may have been answered whole
    by a trusted side that was killed before it closed the record: the next one closes it as interrupted."""
    path = here.bundle / "trusted" / "authority" / "registry.db"
    problems: list[str] = []
    tokens = (whole.prompt_tokens, whole.completion_tokens)
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        deadline = time.monotonic() + SWEEP_SECONDS
        while open_ := db.execute("SELECT count(*) FROM usage WHERE finished IS NULL").fetchone()[0]:
            if time.monotonic() > deadline:
                problems.append(f"{open_} usage records were never closed")
                break
            time.sleep(0.2)
        records = db.execute("SELECT request, outcome, prompt_tokens, completion_tokens FROM usage").fetchall()
    outcomes = Counter(str(outcome) for _, outcome, *_ in records)
    closed = sum(outcome in ("length", "stop") for _, outcome, *_ in records)
    if len({request for request, *_ in records}) < len(records):
        problems.append("usage records were doubled")
    for _, outcome, *used in records:
        if tuple(used) != tokens if outcome in ("length", "stop") else used[1] > tokens[1]:
            problems.append(f"a usage record ({outcome}) has {used[0]} and {used[1]} tokens")
    begun, asked, finished = (1 + sum(getattr(c, name) for c in clients) for name in ("begun", "asked", "finished"))
    if not begun <= len(records) <= asked:
        problems.append(f"{asked} requests were made, {begun} gave text, and there are {len(records)} usage records")
    if finished > closed + torn:
        problems.append(f"{finished} texts came whole, and {closed} usage records say so")
    return dict(sorted(outcomes.items())), problems


def _edge(here: Site, address: str, identity: Path, rows: Path, key: bytes) -> Command:
    return here.edge(address, identity, before=functools.partial(watch.rows, rows, key))


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "worst": round(max(seconds), 2)}
