"""Real processes, real sockets, the real model: `slip trusted` and `slip edge` as an owner and a customer run them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from link_fakes import revoke_device
from processes import WAIT, Process, ask, eventually, start_edge, start_trusted

from sliplm.edge.client import stream
from sliplm.errors import LinkError
from sliplm.registry import authority
from sliplm.split.model import Options, split_model
from sliplm.split.source import load_whole

pytestmark = pytest.mark.slow


class Standing:
    """A trusted side that serves several tests, each with devices of its own."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.process = Process("trusted", bundle / "trusted", "--listen", "127.0.0.1:0")
        self.address: str = self.process.ready()["listening"]

    def enrol(self, identity: Path) -> Path:
        """A new device, named as its file's folder is."""
        authority.add_device(self.bundle / "trusted" / "authority", identity.parent.name, identity)
        return identity


@pytest.fixture(scope="module")
def standing(tiny_split: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    bundle = Path(shutil.copytree(tiny_split, tmp_path_factory.mktemp("standing") / "bundle"))
    one = Standing(bundle)
    yield one
    assert one.process.stop() == 0
    assert "Traceback" not in one.process.log


def test_the_real_model_answers_as_the_original(run: Any, smollm2: str, smollm2_split: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(smollm2_split, tmp_path / "bundle", copy_function=os.link))
    authority.add_device(bundle / "trusted" / "authority", "laptop", tmp_path / "laptop.identity")
    trusted, address = start_trusted(run, bundle)
    edge = start_edge(run, bundle, address, tmp_path / "laptop.identity")
    api = edge.ready()["api"]
    original = load_whole(smollm2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle / "trusted")
    for prompt in ("The capital of France is", "def fibonacci(n):", "Über Gravitation 日本 🙂:"):
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = original.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert ask(api, prompt, max_tokens=32) == tokenizer.decode(ids, skip_special_tokens=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sliplm.cli",
            "generate",
            "What is gravity?",
            "--api",
            api,
            "--max-tokens",
            "12",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert json.loads(done.stdout)["text"].startswith("Gravity is a fundamental concept")
    for secret in ("gravity", "France", "fibonacci"):
        assert secret not in (trusted.log + edge.log)
    assert edge.stop() == 0 and trusted.stop() == 0


def test_the_portable_path_gives_the_same_text(run: Any, bundle: Path, tmp_path: Path) -> None:
    """An edge and a trusted side without the native core, mixed with ones that have it."""
    texts = set()
    for ours, theirs in (("", ""), ("portable", ""), ("", "portable")):
        trusted = run("trusted", bundle / "trusted", "--listen", "127.0.0.1:0", SLIPLM_BACKEND=ours)
        edge = start_edge(run, bundle, trusted.ready()["listening"], tmp_path / "one.identity", SLIPLM_BACKEND=theirs)
        ready = edge.ready()
        assert ("portable" in ready["kernels"]) == bool(theirs)
        texts.add(ask(ready["api"], "Hello", max_tokens=20))
        edge.stop()
        trusted.stop()
    assert len(texts) == 1


def test_the_first_lines_are_the_programs_own(run: Any, tiny_split: Path, tmp_path: Path) -> None:
    """A first start makes the registry; what the packages that do it have to report is not for the owner."""
    bundle = Path(shutil.copytree(tiny_split, tmp_path / "bundle"))
    shutil.rmtree(bundle / "trusted" / "authority", ignore_errors=True)
    trusted = run("trusted", bundle / "trusted", "--listen", "127.0.0.1:0", "--log-format", "json")
    trusted.ready()
    assert trusted.stop() == 0
    trusted._reader.join(5)
    assert {json.loads(line)["logger"].partition(".")[0] for line in trusted.lines} == {"sliplm"}


def test_an_edge_of_another_split_is_refused(run: Any, tiny: Path, standing: Standing, tmp_path: Path) -> None:
    split_model(str(tiny), tmp_path / "other", Options(rank=4))
    identity = standing.enrol(tmp_path / "one.identity")
    log = start_edge(run, tmp_path / "other", standing.address, identity).fails()
    assert "split" in log


def test_a_device_of_another_authority_is_refused(run: Any, standing: Standing, tmp_path: Path) -> None:
    authority.add_device(tmp_path / "elsewhere", "one", tmp_path / "stranger.identity")
    assert "slip: " in start_edge(run, standing.bundle, standing.address, tmp_path / "stranger.identity").fails()


def test_a_revoked_device_is_refused(run: Any, standing: Standing, tmp_path: Path) -> None:
    identity = standing.enrol(tmp_path / "one.identity")
    revoke_device(standing.bundle / "trusted" / "authority", tmp_path.name)
    assert "slip: " in start_edge(run, standing.bundle, standing.address, identity).fails()


def test_the_edges_api_port_is_taken(run: Any, bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        edge = run(
            "edge",
            bundle / "edge",
            "--trusted",
            "127.0.0.1:9",
            "--identity",
            tmp_path / "one.identity",
            "--api",
            f"127.0.0.1:{port}",
        )
        assert str(port) in edge.fails()


def test_an_edge_killed_in_the_middle_of_an_answer(run: Any, standing: Standing, tmp_path: Path) -> None:
    identity = standing.enrol(tmp_path / "one.identity")
    edge = start_edge(run, standing.bundle, standing.address, identity)
    api = edge.ready()["api"]
    want = ask(api, "Hello", max_tokens=20)
    answer = stream(api, "Hello", {"max_tokens": 100, "temperature": 0}, raw=True)
    next(answer)
    edge.stop(signal.SIGKILL)
    with pytest.raises(LinkError):
        list(answer)
    again = start_edge(run, standing.bundle, standing.address, identity).ready()["api"]
    assert ask(again, "Hello", max_tokens=20) == want
    assert standing.process.process.poll() is None and "Traceback" not in standing.process.log


def test_a_trusted_side_killed_in_the_middle_of_an_answer(run: Any, bundle: Path, tmp_path: Path) -> None:
    trusted, address = start_trusted(run, bundle)
    edge = start_edge(run, bundle, address, tmp_path / "one.identity")
    api = edge.ready()["api"]
    want = ask(api, "Hello", max_tokens=20)
    answer = stream(api, "Hello", {"max_tokens": 100, "temperature": 0}, raw=True)
    next(answer)
    trusted.stop(signal.SIGKILL)
    with pytest.raises(LinkError):
        list(answer)
    with pytest.raises(LinkError):
        ask(api, "Hello", max_tokens=1)
    start_trusted(run, bundle, int(address.rsplit(":", 1)[1]))
    assert eventually(lambda: ask(api, "Hello", max_tokens=20)) == want
    assert edge.process.poll() is None and "Traceback" not in edge.log


def test_a_lying_edge_gives_no_text(standing: Standing, tmp_path: Path) -> None:
    """The edge loads a bundle whose digest is right and whose matrix changes in memory by one bit."""
    identity = standing.enrol(tmp_path / "one.identity")
    code = (
        "import sys, numpy as np\n"
        "from sliplm.edge.multiplier import Multiplier\n"
        "honest = Multiplier.product\n"
        "def lie(self, group, x, out=None):\n"
        "    y = honest(self, group, x, out)\n"
        "    if group == 3: y[-1, 5] ^= 4\n"
        "    return y\n"
        "Multiplier.product = lie\n"
        "from sliplm.cli import main\n"
        "main()\n"
    )
    edge = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "edge",
            standing.bundle / "edge",
            "--trusted",
            standing.address,
            "--identity",
            identity,
            "--api",
            "127.0.0.1:0",
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        api = json.loads(edge.stdout.readline())["api"]
        for options in ({}, {"stream": True}):
            body = {"prompt": "Hello", "max_tokens": 5, **options}
            answer = httpx.post(f"{api}/v1/completions", json=body, timeout=WAIT, trust_env=False)
            assert '"text":"' not in answer.text.replace('"text":""', "")
            assert "error" in answer.text
    finally:
        edge.kill()
        edge.wait()
        edge.stdout.close()


def test_clients_in_parallel_get_their_own_answers(run: Any, standing: Standing, tmp_path: Path) -> None:
    identity = standing.enrol(tmp_path / "one.identity")
    api = start_edge(run, standing.bundle, standing.address, identity).ready()["api"]
    prompts = [f"Prompt {i}" for i in range(6)]
    alone = [ask(api, p, max_tokens=16) for p in prompts]
    together: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=p: together.update({p: ask(api, p, max_tokens=16)})) for p in prompts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together[p] for p in prompts] == alone
