"""The command line: JSON on stdout, one sentence on stderr, exit codes that mean something."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import slip

pytestmark = pytest.mark.slow


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert sum(line.startswith("slip: ") for line in done.stderr.splitlines()) == 1


def test_split_reports_as_json_and_as_text(tiny: Path, tmp_path: Path) -> None:
    done = slip("split", tiny, "-o", tmp_path / "a", "--rank", "4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layers"] == 15 and report["groups"] == 9 and len(report["digest"]) == 64
    done = slip("split", tiny, "-o", tmp_path / "b", "--rank", "4", "--planes", "1")
    assert done.returncode == 0 and "keep it secret" in done.stdout
    refused(slip("split", tiny, "-o", tmp_path / "b"), "already exists")


@pytest.mark.parametrize("options", [("--rank", "0"), ("--planes", "3")])
def test_split_refuses_senseless_options(options: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    refused(slip("split", tiny, "-o", tmp_path / "x", *options))
    assert not (tmp_path / "x").exists()


def test_bad_input_gives_one_sentence(tiny: Path, tiny_split: Path, tmp_path: Path) -> None:
    refused(slip("split", tmp_path / "nothing", "-o", tmp_path / "x"), "not a model")
    refused(slip("trusted", tmp_path), "not a bundle")
    refused(slip("trusted", tiny_split / "edge"), "not a manifest for the trusted side")
    refused(slip("edge", tiny_split / "trusted", "--trusted", "127.0.0.1:1", "--identity", tmp_path / "i"), "not a")
    refused(slip("edge", tiny_split / "edge", "--trusted", "127.0.0.1:1", "--identity", tmp_path / "nothing"))
    refused(slip("edge", tiny_split / "edge", "--trusted", "nonsense", "--identity", tmp_path / "nothing"), "HOST:PORT")
    refused(slip("generate", "hi", "--api", "http://127.0.0.1:1"), "no answer")
    refused(slip("evaluate", tmp_path, "--reference", tiny), "not a bundle")
    refused(slip("device", "add", "x", "-b", tmp_path), "not a bundle")


def test_a_port_in_use(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(slip("trusted", bundle / "trusted", "--listen", f"127.0.0.1:{port}"), str(port))


def test_devices_are_added_listed_limited_and_revoked(tiny_split: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_split / "trusted", tmp_path / "trusted")
    identity = tmp_path / "laptop.identity"
    added = json.loads(
        slip("device", "add", "laptop", "-b", bundle, "-o", identity, "--daily-tokens", "500", "--json").stdout
    )
    assert added["identity"] == str(identity) and identity.stat().st_mode & 0o077 == 0
    refused(slip("device", "add", "laptop", "-b", bundle, "-o", tmp_path / "again"), "laptop")
    refused(slip("device", "add", "a/b", "-b", bundle, "-o", tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    rows = json.loads(slip("device", "list", "-b", bundle, "--json").stdout)["devices"]
    assert [(r["name"], r["state"]) for r in rows] == [("laptop", "active")]
    changed = json.loads(slip("device", "limit", "laptop", "-b", bundle, "--concurrent", "2", "--json").stdout)
    assert changed["limits"] == {"concurrent": 2, "tokens_per_minute": None, "daily_tokens": 500}
    assert slip("device", "revoke", "laptop", "-b", bundle).returncode == 0
    assert "revoked" in slip("device", "list", "-b", bundle).stdout
    shown = json.loads(slip("device", "show", "laptop", "-b", bundle, "--json").stdout)
    assert shown["state"] == "revoked" and shown["limits"] == changed["limits"]
    assert [e["kind"] for e in shown["events"]] == ["revoked", "limited", "added"]
    assert shown["usage"]["total"] == {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    refused(slip("device", "revoke", "laptop", "-b", bundle), "laptop")
    refused(slip("device", "revoke", "nobody", "-b", bundle), "nobody")
    refused(slip("device", "resume", "laptop", "-b", bundle), "not suspended")
    refused(slip("device", "list", "-b", bundle, "--registry", "nonsense"), "not a URL")


def test_devices_are_edges_helpers_or_both(tiny_split: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_split / "trusted", tmp_path / "trusted")

    def add(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return slip("device", "add", name, "-b", bundle, "-o", tmp_path / f"{name}.identity", *options)

    assert "laptop.identity: identity of 'laptop', edge of party 'laptop', valid until" in add("laptop").stdout
    assert json.loads(add("farm", "--helper", "--party", "Acme", "--json").stdout).items() >= {
        ("party", "Acme"),
        ("edge", False),
        ("helper", True),
    }
    assert "edge and helper of party 'Acme'" in add("idle", "--helper", "--edge", "--party", "Acme").stdout
    refused(add("x", "--party", ""), "a party name has 1 to 64 letters")
    assert not (tmp_path / "x.identity").exists()
    rows = json.loads(slip("device", "list", "-b", bundle, "--json").stdout)["devices"]
    assert [(r["name"], r["party"], r["edge"], r["helper"]) for r in rows] == [
        ("laptop", "laptop", True, False),
        ("farm", "Acme", False, True),
        ("idle", "Acme", True, True),
    ]
    lines = slip("device", "list", "-b", bundle).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["edge of laptop", "helper of Acme", "edge and helper of Acme"]
    shown = json.loads(slip("device", "show", "farm", "-b", bundle, "--json").stdout)
    assert (shown["party"], shown["edge"], shown["helper"]) == ("Acme", False, True)
    assert "may be        helper, of party 'Acme'" in slip("device", "show", "farm", "-b", bundle).stdout


@pytest.mark.parametrize("command", ["add", "list", "show", "limit", "revoke", "resume"])
def test_devices_are_a_trusted_bundles_only(command: str, tiny_split: Path, tmp_path: Path) -> None:
    """The edge's bundle goes to whoever must not have the authority's key."""
    bundle = Path(shutil.copytree(tiny_split, tmp_path / "bundle"))
    before = sorted(bundle.rglob("*"))
    name = [] if command == "list" else ["x"]
    output = ["-o", tmp_path / "x.identity"] if command == "add" else []
    for wrong in (bundle / "edge", bundle, tmp_path / "nothing"):
        refused(slip("device", command, *name, "-b", wrong, *output), "trusted side")
    assert sorted(bundle.rglob("*")) == before and not (tmp_path / "x.identity").exists()


def test_names_and_origins_that_are_none(tiny_split: Path, tmp_path: Path) -> None:
    for name in ("", "two\nlines", "x" * 129):
        refused(slip("trusted", tiny_split / "trusted", "--name", name), "a model's name has 1 to 128 bytes")
    arguments = ("edge", tiny_split / "edge", "--trusted", "127.0.0.1:1", "--identity", tmp_path / "i")
    for origin in ("*", "null", "app.example.com", "https://app.example.com/page"):
        refused(slip(*arguments, "--api-origin", origin), "not the origin of a web page")
    refused(slip(*arguments, "--api-name", "box.lan:8443"), "without scheme, port or path")


def test_evaluate_reports_what_it_measured(tiny: Path, tiny_split: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"All work and no play makes number {i} a dull boy." for i in range(20)))
    done = slip(
        "evaluate", tiny_split, "--reference", tiny, "--text", text, "--tokens", "512", "--greedy", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["protected"]["kl"] < 1e-5 < report["bf16"]["kl"] < report["edge_only"]["kl"]
    assert report["protected"]["rms_logit_error"] < 1e-3
    assert report["greedy"]["unexplained"] == 0
    refused(slip("evaluate", tiny_split, "--reference", tiny, "--text", tmp_path / "none"), "cannot read")


def test_evaluate_refuses_halves_of_two_splits(tiny: Path, tiny_split: Path, tmp_path: Path) -> None:
    assert slip("split", tiny, "-o", tmp_path / "other", "--rank", "4").returncode == 0
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "edge").symlink_to(tmp_path / "other" / "edge")
    (tmp_path / "mixed" / "trusted").symlink_to(tiny_split / "trusted")
    refused(slip("evaluate", tmp_path / "mixed", "--reference", tiny), "two different splits")


SLOW_SPLIT = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have them ignored
import sliplm.split.model as module
from sliplm.split.writer import new_directory
from sliplm.cli import main

def split_model(model, out, *_, **__):
    with new_directory(out):
        print("begun", flush=True)
        time.sleep(60)

module.split_model = split_model
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_split_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_SPLIT, "split", "model", "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "begun\n"
        run.send_signal(number)
        try:
            assert run.wait(30) == 128 + number
        finally:
            run.kill()
    assert list(tmp_path.iterdir()) == []
