"""Thirty-two requests at once, in the middle of which machines are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from loading import attached
from processes import WAIT, Process, start_edge

from sliplm.edge.side import Edge
from sliplm.engine.builtin import BuiltinEngine
from sliplm.protocol.messages import GenerateRequest
from sliplm.registry import authority

REQUESTS, TOKENS = 32, 60

RIVAL = 0.01
"""Of two tokens whose log-probabilities are closer than this, either may come first where sums are done in another
order."""


class Machines:
    """Two edges of two customers and two helpers of a third party, as processes, for the trusted side at `address`."""

    def __init__(self, run: Any, directory: Path, address: str, how: signal.Signals) -> None:
        self._folder, self._authority, self._how = directory.parent, directory / "trusted" / "authority", how
        self.helpers = [
            run("helper", directory / "edge", "--trusted", address, "--identity", self.enrol(name, "rack", "helper"))
            for name in ("rack1", "rack2")
        ]
        self.edges = [
            start_edge(run, directory, address, self.enrol(name, name, "edge")) for name in ("north", "south")
        ]
        for process in self.helpers + self.edges:
            process.ready()

    def enrol(self, name: str, party: str, role: str) -> Path:
        identity = self._folder / f"{name}.identity"
        roles = {"edge": role == "edge", "helper": role == "helper"}
        authority.add_device(self._authority, name, identity, party=party, **roles)
        return identity

    def lose_one(self, machines: list[Process]) -> Callable[[], None]:
        """What kills or stops one of `machines`: whichever has worked most since now."""
        before = [_worked(machine) for machine in machines]

        def lose() -> None:
            done = [_worked(machine) - start for machine, start in zip(machines, before, strict=True)]
            os.kill(machines[done.index(max(done))].process.pid, self._how)

        return lose


def right_texts(split: Path) -> dict[str, str]:
    """Prompts, and what the built-in engine answers to each alone, greedy; no token of theirs has a rival."""
    engine = attached(BuiltinEngine(split / "trusted", allow_logprobs=True))
    texts: dict[str, str] = {}
    numbers = count()
    while len(texts) < REQUESTS:
        request = GenerateRequest(prompt=f"Request {next(numbers)}", max_tokens=TOKENS, temperature=0, logprobs=2)
        chunks = list(engine.generate(request, engine.model.slip.default_link))
        tops = [said.top for chunk in chunks for said in chunk.logprobs]
        if all(first[1] - second[1] > RIVAL for first, second in tops):
            texts[request.prompt] = "".join(chunk.text for chunk in chunks)
    return texts


def _worked(machine: Process) -> float:
    times = psutil.Process(machine.process.pid).cpu_times()
    return times.user + times.system


def asked_by(edge: Edge) -> Callable[[str], Iterable[str]]:
    """How `edge`, which computes nothing, asks for the text after a prompt, piece by piece."""

    def ask(prompt: str) -> Iterable[str]:
        return (chunk.text for chunk in edge.generate(GenerateRequest(prompt=prompt, max_tokens=TOKENS, temperature=0)))

    return ask


def ask_all(
    ask: Callable[[str], Iterable[str]], prompts: Collection[str], losses: Sequence[Callable[[], None]]
) -> dict[str, str]:
    """The texts of all `prompts` at once, which `ask` yields in pieces. After each tenth of all tokens one of `losses`
    happens; some requests are not whole then."""
    texts: dict[str, str] = {}
    pieces = dict.fromkeys(prompts, 0)
    problems: list[str] = []

    def one(prompt: str) -> None:
        text = ""
        try:
            for piece in ask(prompt):
                text += piece
                pieces[prompt] += 1
        except Exception as error:
            problems.append(f"{prompt}, after {len(text)} characters: {error}")
        texts[prompt] = text

    threads = [threading.Thread(target=one, args=(prompt,), daemon=True) for prompt in prompts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + WAIT
    for number, lose in enumerate(losses, 1):
        while sum(pieces.values()) < number * len(prompts) * TOKENS // 10 and not problems:
            assert time.monotonic() < deadline, "nothing comes any more"
            time.sleep(0.005)
        lose()
        assert len(texts) < len(prompts)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not problems, problems
    return texts
