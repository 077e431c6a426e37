"""What a bad network, or somebody on the way, does to a connection below its TLS: texts are right or fail, and the edge
comes back by itself."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.soak.processes import Site, eventually, site, text
from bench.soak.proxy import FAULTS, Fault, Proxy, Slow
from sliplm.errors import SlipError

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "Hello", 6
RECOVERY_SECONDS = 5.0


def impatient() -> None:
    """Time limits of seconds in place of half minutes: a test waits for them."""
    from sliplm.edge.worker import EdgeWorker
    from sliplm.serve.server import TrustedServer

    edge, trusted = EdgeWorker.__init__.__kwdefaults__, TrustedServer.__init__.__kwdefaults__
    assert {"idle_timeout", "generate_timeout"} <= edge.keys() and {"keepalive", "exchange_timeout"} <= trusted.keys()
    edge |= {"idle_timeout": 2.0, "generate_timeout": 3.0}
    trusted |= {"keepalive": 0.5, "exchange_timeout": 1.5}


@pytest.fixture(scope="module")
def here(tiny_split: Path) -> Iterator[Site]:
    with site(tiny_split) as one:
        yield one


@pytest.fixture(scope="module")
def path(here: Site) -> Iterator[tuple[Proxy, str, str]]:
    """A proxy between an edge and its trusted side, the edge's API, and the true text."""
    _, address = here.trusted(before=impatient)
    with Proxy(address) as proxy:
        edge = here.edge(proxy.address, here.enrol("one"), before=impatient)
        api = edge.ready()["api"]
        yield proxy, api, text(api, PROMPT, TOKENS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_connection_gives_no_wrong_text_and_is_made_again(
    here: Site, path: tuple[Proxy, str, str], fault: str
) -> None:
    proxy, api, truth = path
    rng = random.Random(fault)
    made: list[Any] = []
    for _ in range(4):

        def make() -> Fault:
            # The handshake of a connection takes about 2 kB, a token some 50 kB.
            made.append(FAULTS[fault](int(rng.expovariate(1 / 20_000))))
            return made[-1]

        proxy.make_fault = make
        proxy.cut()
        with contextlib.suppress(SlipError):  # or the edge comes back in time, and the text goes on
            assert text(api, PROMPT, TOKENS) == truth
        proxy.make_fault = None
        proxy.cut()
        started = time.monotonic()
        assert eventually(lambda: text(api, PROMPT, TOKENS), 30) == truth
        assert time.monotonic() - started < RECOVERY_SECONDS + 25  # the text itself takes its time on a busy machine
    assert any(one.struck for one in made), "the fault never struck"
    assert not any(command.complaints() for command in here.commands)


def test_a_slow_connection_gives_the_right_text(path: tuple[Proxy, str, str]) -> None:
    proxy, api, truth = path
    proxy.make_fault = lambda: Slow(0)
    proxy.cut()
    assert eventually(lambda: text(api, PROMPT, TOKENS), 30) == truth
    proxy.make_fault = None
