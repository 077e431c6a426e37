"""Many streams through several edges at once, for minutes: every text right, nobody starved, nothing leaks."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

from bench.soak.processes import Command, ask, site, text

TOKENS = 16
WARM_UP = 0.2
"""The share of the time after which memory has to stay flat: caches and allocators fill up first."""

FLAT = 0.05
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "A good recipe for bread needs",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "To be, or not to be,",
    "The largest planet in the solar system is",
    "My favourite season is",
    "SELECT name FROM users WHERE",
    "The mitochondria is the",
    "Gravity is",
    "Dear Sir or Madam, I am writing to",
]


class Stream(threading.Thread):
    """Asks one edge for one text, over and over."""

    def __init__(self, api: str, prompt: str, truth: str, tokens: int, until: float) -> None:
        super().__init__(daemon=True)
        self._api, self._prompt, self._truth, self._tokens, self._until = api, prompt, truth, tokens, until
        self.done = 0
        self.seconds = 0.0
        self.problems: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self._until:
            started, got, count = time.monotonic(), "", 0
            try:
                for chunk in ask(self._api, self._prompt, self._tokens, timeout=120):
                    got += chunk.text
                    count = chunk.completion_tokens or count
            except Exception as error:
                self.problems.append(str(error))
                continue
            self.seconds += time.monotonic() - started
            self.done += count
            if got != self._truth:
                self.problems.append(f"the text for {self._prompt!r} differs from its single-stream text")

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.done / self.seconds if self.seconds else 0.0


def run(
    bundle: Path, seconds: float = 600.0, streams: int = 16, edges: int = 4, flat: float = FLAT, fresh: bool = True
) -> dict[str, Any]:
    """Run `streams` streams through `edges` edges for `seconds`; memory may grow by the share `flat`."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(streams)]
    with site(bundle) as here:
        trusted, address = here.trusted(fresh=fresh)
        running = [here.edge(address, here.enrol(f"edge{i}"), fresh=fresh) for i in range(edges)]
        apis = [edge.ready()["api"] for edge in running]
        truths = {prompt: text(apis[0], prompt, TOKENS) for prompt in dict.fromkeys(prompts)}
        commands = {"trusted": trusted, **{f"edge{i}": edge for i, edge in enumerate(running)}}
        started, before = time.monotonic(), _cpu_seconds(commands)
        threads = [
            Stream(apis[i % edges], prompt, truths[prompt], TOKENS, started + seconds)
            for i, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        samples = _sample(commands, started, seconds)
        for thread in threads:
            thread.join(180)
        took = time.monotonic() - started
        tokens = sum(thread.done for thread in threads)
        spent = {name: after - before[name] for name, after in _cpu_seconds(commands).items()}
        problems = [f"stream {i}: {p}" for i, thread in enumerate(threads) for p in thread.problems[:3]]
        problems += [f"stream {i} hangs" for i, thread in enumerate(threads) if thread.is_alive()]
        for name, command in commands.items():
            if not command.alive:
                problems.append(f"{name} ended")
            if complaints := command.complaints():
                problems.append(f"{name}: {complaints}")
        speeds = [thread.speed for thread in threads]
        if min(speeds) < max(speeds) / 2:
            problems.append(f"the slowest stream had {min(speeds):.2f} tokens/s, the fastest {max(speeds):.2f}")
        held = {}
        for name, series in samples.items():
            held[name] = _growth(series)
            if held[name]["growth"] > flat:
                problems.append(f"{name}: memory grew by {held[name]['growth']:.1%} after the warm-up")
        return {
            "streams": streams,
            "edges": edges,
            "seconds": round(took, 1),
            "tokens": tokens,
            "tokens per second": round(tokens / took, 2),
            "CPU ms a token": {name: round(1e3 * cpu / max(1, tokens), 2) for name, cpu in spent.items()},
            "slowest and fastest stream, tokens/s": [round(min(speeds), 3), round(max(speeds), 3)],
            "held": held,
            "problems": problems,
        }


def _cpu_seconds(commands: dict[str, Command]) -> dict[str, float]:
    """Of each process that lives, and of this one, which reads the texts."""
    spent = {name: command.cpu_seconds() for name, command in commands.items() if command.alive}
    return {**spent, "clients": time.process_time()}


def _sample(commands: dict[str, Command], started: float, seconds: float) -> dict[str, list[dict[str, float]]]:
    """What each process holds of the machine, some fifty times: to look at its memory map takes milliseconds, in which
    the process may wait."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    while (now := time.monotonic() - started) < seconds:
        for name, command in commands.items():
            if command.alive:
                samples[name].append({"at": now / seconds, **command.usage()})
        time.sleep(max(0.2, seconds / 50))
    return samples


def _growth(series: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the first and the last fifth of what follows the warm-up."""
    settled = [s for s in series if s["at"] >= WARM_UP]
    fifth = max(1, len(settled) // 5)
    first, last = settled[:fifth], settled[-fifth:]
    a, b = (statistics.median(s["memory"] for s in part) for part in (first, last))
    return {
        "memory, MB": [round(a / 1e6, 1), round(b / 1e6, 1)],
        "growth": round(b / a - 1, 4),
        "threads": [max(s["threads"] for s in part) for part in (first, last)],
        "descriptors": [max(s["descriptors"] for s in part) for part in (first, last)],
    }
