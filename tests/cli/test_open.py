"""Real processes with open blocks: the text, the requests' ends, and an edge that cannot compute them."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from loading import attached
from processes import ask, start_edge, start_trusted
from tiny import save_tiny

from sliplm.edge.client import stream
from sliplm.edge.open import CacheLimits
from sliplm.edge.side import Edge
from sliplm.engine.builtin import BuiltinEngine
from sliplm.errors import BundleError, BusyError, LinkError
from sliplm.protocol.messages import GenerateRequest
from sliplm.registry import authority
from sliplm.split.model import Options, split_model
from sliplm.trusted.side import Trusted

pytestmark = pytest.mark.slow
PROMPTS = ("Hello", "The capital of France", "x")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("open") / "model", num_hidden_layers=4)


@pytest.fixture(params=["first:1", "trusted:1"])
def site(request: Any, checkpoint: Path, tmp_path: Path) -> Path:
    split_model(str(checkpoint), tmp_path / "bundle", Options(rank=4, plan=request.param))
    authority.add_device(tmp_path / "bundle" / "trusted" / "authority", "one", tmp_path / "one.identity")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def masked(checkpoint: Path) -> BuiltinEngine:
    """The same model, every block masked, whose texts other tests compare with the original's."""
    split_model(str(checkpoint), checkpoint.parent / "all", Options(rank=4))
    return attached(BuiltinEngine(checkpoint.parent / "all" / "trusted"))


def said(engine: BuiltinEngine, prompt: str, count: int) -> str:
    request = GenerateRequest(prompt=prompt, max_tokens=count)
    return "".join(chunk.text for chunk in engine.generate(request, engine.model.slip.default_link))


def test_two_processes_give_the_same_text_as_with_every_block_masked(
    run: Any, site: Path, masked: BuiltinEngine, tmp_path: Path
) -> None:
    want = {prompt: said(masked, prompt, 20) for prompt in PROMPTS}
    trusted, address = start_trusted(run, site)
    edge = start_edge(run, site, address, tmp_path / "one.identity")
    api = edge.ready()["api"]
    assert {prompt: ask(api, prompt, max_tokens=20) for prompt in PROMPTS} == want
    got: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=prompt: got.update({p: ask(api, p, max_tokens=20)})) for prompt in PROMPTS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == want
    # Its edge goes in the middle: the request ends with one sentence, and the next one is as before.
    answer = stream(api, "Hello", {"max_tokens": 100, "temperature": 0}, raw=True)
    next(answer)
    edge.stop(signal.SIGKILL)
    with pytest.raises(LinkError):
        list(answer)
    api = start_edge(run, site, address, tmp_path / "one.identity").ready()["api"]
    assert ask(api, "Hello", max_tokens=20) == want["Hello"]
    assert "Traceback" not in trusted.log


def test_an_edge_without_torch_says_so(run: Any, site: Path, tmp_path: Path) -> None:
    import os

    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('no torch here', name='torch')\n")
    path = os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    edge = start_edge(run, site, "127.0.0.1:9", tmp_path / "one.identity", PYTHONPATH=path)
    assert "open blocks, which take torch and Transformers: pip install 'sliplm[open]'" in edge.fails()


@pytest.fixture
def sides(site: Path, tmp_path: Path) -> Any:
    """Both sides in this process, over TLS; the edge has room for two requests."""
    trusted = Trusted(site / "trusted")
    edge = Edge(site / "edge", trusted.address, tmp_path / "one.identity", CacheLimits(count=2))
    threads = [threading.Thread(target=trusted.serve_forever), threading.Thread(target=edge.run)]
    for thread in threads:
        thread.start()
    assert edge.connected.wait(30)
    yield edge, edge._blocks
    edge.stop()
    trusted.close()
    for thread in threads:
        thread.join(30)


def test_a_cache_goes_when_its_request_ends(sides: Any) -> None:
    from link_fakes import wait_until

    edge, blocks = sides
    with edge.generate(GenerateRequest(prompt="Hello", max_tokens=8)) as answer:
        assert list(answer)[-1].finish_reason
    wait_until(lambda: not blocks.requests)
    answer = edge.generate(GenerateRequest(prompt="Hello", max_tokens=100))
    next(c for c in answer if c.completion_tokens > 1)
    assert blocks.requests == 1 and blocks.bytes > 0
    answer.close()  # cancelled
    wait_until(lambda: not blocks.requests and not blocks.bytes)


def test_one_request_too_many_is_told_so_and_others_go_on(sides: Any) -> None:
    edge, blocks = sides
    compute = blocks.compute
    blocks.compute = lambda *what: (time.sleep(0.03), compute(*what))[1]  # so that none is done before its time
    running = [edge.generate(GenerateRequest(prompt="Hello", max_tokens=110)) for _ in range(2)]
    for answer in running:
        next(c for c in answer if c.completion_tokens > 1)
    with pytest.raises(BusyError, match="caches of 2 requests, and no room for another"):
        list(edge.generate(GenerateRequest(prompt="Hello", max_tokens=3)))
    first, second = ("".join(c.text for c in answer) for answer in running)
    assert first and second


def test_the_engine_takes_no_bundle_whose_open_blocks_it_does_not_have(
    site: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A damaged configuration is one sentence."""
    import json

    from sliplm.bundle import sha256_file

    config = json.loads((site / "trusted" / "config.json").read_text())
    config["quantization_config"]["open"]["runs"] = [[1, 9]]
    (site / "trusted" / "config.json").write_text(json.dumps(config))
    manifest = json.loads((site / "trusted" / "manifest.json").read_text())
    manifest["files"]["config.json"] = sha256_file(site / "trusted" / "config.json")
    (site / "trusted" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no such blocks as the bundle says are open"):
        BuiltinEngine(site / "trusted")
