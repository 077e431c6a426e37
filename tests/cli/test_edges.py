"""Two customers' edges behind one trusted side, as real processes: whatever happens to one, no request is lost."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import Process, ask, eventually

from sliplm.registry import authority

pytestmark = pytest.mark.slow

LIE = """
import sys
from sliplm.edge.multiplier import Multiplier
honest = Multiplier.product
def lie(self, group, x, out=None):
    y = honest(self, group, x, out)
    if self.asked > 10: y[-1, 5] ^= 4
    self.asked += 1
    return y
Multiplier.asked = 0
Multiplier.product = lie
from sliplm.cli import main
main()
"""


class Lying(Process):
    """An edge that answers rightly at first."""

    command = (sys.executable, "-c", LIE)


class Two:
    """A trusted side, and the edge of its first customer."""

    def __init__(self, run: Any, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.asked, self._lock = 0, threading.Lock()
        authority.add_device(bundle / "trusted" / "authority", "two", folder / "two.identity")
        self.trusted = run("trusted", bundle / "trusted", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
        ready = self.trusted.ready()
        self.address, self.metrics = ready["listening"], ready["metrics"]
        first = run(*self.edge("one"))
        self.api = first.ready()["api"]

    def edge(self, name: str) -> list[str | Path]:
        identity = self.folder / f"{name}.identity"
        return ["edge", self.bundle / "edge", "--trusted", self.address, "--identity", identity, "--api", "127.0.0.1:0"]

    def value(self, name: str) -> float:
        text = httpx.get(f"{self.metrics}/metrics", trust_env=False).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"slip_trusted_{name} ")))

    def ask_until(self, enough: Callable[[], bool], happens: Callable[[], None] = lambda: None) -> None:
        """Several requests at once, again and again until it is `enough`, and some after that, when something
        `happens`. Their texts are right. An edge that is not worth it is only tried now and then."""
        prompts = [f"Prompt {i}" for i in range(6)]
        alone = {prompt: self.ask(prompt) for prompt in prompts}
        wrong: list[str] = []
        happened = threading.Event()

        def one(prompt: str) -> None:
            left = 3  # after it
            while left:
                left -= happened.is_set()
                if self.ask(prompt) != alone[prompt]:
                    wrong.append(prompt)

        threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 100
        while not (reached := enough()) and time.monotonic() < deadline:
            time.sleep(0.01)
        happens()
        happened.set()
        for thread in threads:
            thread.join(120)
        assert reached and not wrong and not any(thread.is_alive() for thread in threads)

    def ask(self, prompt: str) -> str:
        with self._lock:
            self.asked += 1
        return ask(self.api, prompt, max_tokens=60)


@pytest.fixture
def two(run: Any, bundle: Path, tmp_path: Path) -> Iterator[Two]:
    both = Two(run, bundle, tmp_path)
    yield both
    assert both.trusted.stop() == 0
    assert "Traceback" not in both.trusted.log


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_edge_that_dies_or_stalls_costs_no_request(two: Two, run: Any, how: signal.Signals) -> None:
    other = run(*two.edge("two"))
    other.ready()
    two.ask_until(lambda: two.value('edge_rows_total{kind="two"}') >= 20, lambda: other.process.send_signal(how))
    assert two.value("exchanges_replaced_total") <= 1  # none if it was idle at that moment

    def alone() -> None:
        assert two.value("edges_connected") == 1

    eventually(alone)
    assert two.value('requests_total{outcome="length"}') + two.value('requests_total{outcome="stop"}') == two.asked


def test_a_lying_edge_of_another_customer_costs_no_request(two: Two) -> None:
    liar = Lying(*two.edge("two"))
    try:
        liar.ready()
        two.ask_until(lambda: two.value("verification_failures_total") > 0)
        assert two.value("verification_failures_total") == 1
        assert two.value('requests_total{outcome="unverified"}') == 0
        assert liar.process.wait(30) != 0
    finally:
        liar.process.kill()
        liar.process.wait()
        liar.process.stdout.close()
    with authority.open_registry(two.bundle / "trusted" / "authority") as registry:
        states = {device.name: device.state for device in registry.devices.all()}
    assert states == {"one": "active", "two": "suspended"}


def test_a_device_without_a_worker_is_served_by_another(two: Two, run: Any) -> None:
    """The second customer's edge stops to compute, and its API goes on to ask."""
    other = run(*two.edge("two"))
    api = other.ready()["api"]
    want = ask(two.api, "Hello", max_tokens=20)
    assert ask(api, "Hello", max_tokens=20) == want
