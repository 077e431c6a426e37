"""Real processes: a trusted side without Q, an edge, and helpers that make its pads."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import ask, slip, start_edge

from sliplm.registry import authority

pytestmark = pytest.mark.slow
PROMPT = "The capital of"


class Site:
    """A split of which the trusted side has its own half only, and devices as they are wanted."""

    def __init__(self, run: Any, split: Path, home: Path, pads: str = "helpers") -> None:
        self.run, self.home = run, home
        shutil.copytree(split / "edge", home / "away" / "edge")
        shutil.copytree(split / "trusted", home / "trusted")
        self.trusted = run("trusted", home / "trusted", "--pads", pads, "--listen", "127.0.0.1:0", "--stock", "16")
        self.address = self.trusted.ready()["listening"]

    def enrol(self, name: str, party: str, **roles: bool) -> Path:
        identity = self.home / f"{name}.identity"
        authority.add_device(self.home / "trusted" / "authority", name, identity, party=party, **roles)
        return identity

    def helper(self, identity: Path) -> Any:
        return self.run("helper", self.home / "away" / "edge", "--trusted", self.address, "--identity", identity)

    def edge(self, identity: Path) -> Any:
        return start_edge(self.run, self.home / "away", self.address, identity)


@pytest.fixture
def site(run: Any, tiny_split: Path, tmp_path: Path) -> Site:
    return Site(run, tiny_split, tmp_path)


def test_a_trusted_side_without_q_answers_as_one_that_has_it(
    site: Site, run: Any, tiny_split: Path, tmp_path: Path
) -> None:
    helper = site.helper(site.enrol("rack", "rack", edge=False, helper=True))
    assert helper.ready()["trusted"] == site.address
    api = site.edge(site.enrol("laptop", "customer")).ready()["api"]
    answer = ask(api, PROMPT, max_tokens=40)
    beside = Path(shutil.copytree(tiny_split, tmp_path / "beside"))
    authority.add_device(beside / "trusted" / "authority", "laptop", tmp_path / "beside.identity")
    own = run("trusted", beside / "trusted", "--listen", "127.0.0.1:0")
    other = start_edge(run, beside, own.ready()["listening"], tmp_path / "beside.identity")
    assert ask(other.ready()["api"], PROMPT, max_tokens=40) == answer
    assert helper.stop() == 0 and site.trusted.stop(signal.SIGTERM) == 0
    assert "Traceback" not in helper.log + site.trusted.log


def test_without_a_helper_of_another_party_a_request_is_told_so(site: Site) -> None:
    both = site.enrol("both", "customer", edge=True, helper=True)
    site.helper(both).ready()
    api = site.edge(both).ready()["api"]
    done = slip("generate", PROMPT, "--api", api, "--raw")
    assert done.returncode != 0
    assert "no helper of another party than this edge's is connected to make one-time pads" in done.stderr
    site.helper(site.enrol("rack", "rack", edge=False, helper=True)).ready()
    assert ask(api, PROMPT, max_tokens=5)


def test_a_helper_that_may_not_be_one_says_why(site: Site, tmp_path: Path, run: Any, tiny_split: Path) -> None:
    edge = site.enrol("laptop", "customer")
    assert "is enrolled as an edge and cannot be a helper" in site.helper(edge).fails()
    helper = site.enrol("rack", "rack", edge=False, helper=True)
    assert "is enrolled as a helper and cannot be an edge" in site.edge(helper).fails()
    assert (
        "is not a bundle for the edge"
        in run("helper", tmp_path / "nothing", "--trusted", site.address, "--identity", helper).fails()
    )


def test_killing_helpers_loses_no_request(site: Site) -> None:
    identities = [site.enrol(f"rack{i}", "rack", edge=False, helper=True) for i in range(2)]
    helpers = [site.helper(identity) for identity in identities]
    for helper in helpers:
        helper.ready()
    api = site.edge(site.enrol("laptop", "customer")).ready()["api"]
    answer = ask(api, PROMPT, max_tokens=60)
    for i in range(4):
        helpers[i % 2].stop(signal.SIGKILL)
        assert ask(api, PROMPT, max_tokens=60) == answer
        helpers[i % 2] = site.helper(identities[i % 2])
        helpers[i % 2].ready()
