"""`slip chat`: from a pipe, and by hand in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_api import listening

from sliplm.edge.api import create_app
from sliplm.errors import LinkError
from sliplm.protocol.messages import Chunk, GenerateRequest

pytestmark = pytest.mark.slow

SLIP = [sys.executable, "-c", "from sliplm.cli import main; main()"]


class Parrot:
    """Repeats the question with the number of messages; "talk" never ends, "fail" breaks off."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []
        self.stopped = threading.Event()

    def __call__(self, request: GenerateRequest) -> Iterator[Chunk]:
        self.asked.append(request)
        return Speech(self, request.messages[-1].content, len(request.messages))


class Speech(Iterator[Chunk]):
    def __init__(self, parrot: Parrot, question: str, messages: int) -> None:
        self.parrot, self.question, self.count = parrot, question, 0
        self.pieces = [f"[{messages}] ", question, "\x1b]0;evil\x07"]

    def __next__(self) -> Chunk:
        if self.parrot.stopped.is_set() and self.question == "talk":
            raise LinkError("cancelled")
        self.count += 1
        time.sleep(0.01)
        if self.question == "fail" and self.count > 1:
            raise LinkError("generation stopped")
        if self.question == "talk" or self.count <= len(self.pieces):
            return Chunk(self.pieces[(self.count - 1) % 2] if self.question == "talk" else self.pieces[self.count - 1])
        return Chunk("", "stop", 3, 3)

    def close(self) -> None:
        if self.question == "talk":
            self.parrot.stopped.set()


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def url(parrot: Parrot) -> Iterator[str]:
    with listening(create_app(parrot, lambda: "parrot", host="127.0.0.1", api_key=None)) as url:
        yield url


def piped(url: str, text: str | bytes, *options: str) -> subprocess.CompletedProcess[str]:
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*SLIP, "chat", "--api", url, *options], input=data, capture_output=True, timeout=90)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def test_lines_from_a_pipe_are_one_conversation(url: str, parrot: Parrot, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    text = f"/system Be brief.\nhello\n\nand \\\nagain\n/save {saved}\n/reset\nfresh\n/quit\nnever"
    done = piped(url, text, "--temperature", "0", "--max-tokens", "7", "--seed", "5")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.replace("\x1b]0;evil\x07", "") == "[2] hello\n[4] and \nagain\n[2] fresh\n"
    assert (parrot.asked[0].max_tokens, parrot.asked[0].temperature, parrot.asked[0].seed) == (7, 0, 5)
    roles = [m["role"] for m in json.loads(saved.read_text())]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m.content for m in parrot.asked[-1].messages] == ["Be brief.", "fresh"]


def test_what_goes_wrong_in_a_pipe_is_one_sentence(url: str, tmp_path: Path) -> None:
    for text, says in (
        ("fail\n", "generation stopped"),
        ("/wibble\n", "not a command"),
        (f"/save {tmp_path}/none/x\n", "cannot write"),
        (b"\xff\xfe\n", "UTF-8"),
    ):
        done = piped(url, text)
        assert done.returncode == 1 and done.stderr.count("slip: ") == 1 and says in done.stderr, done.stderr
    done = piped("http://127.0.0.1:1", "hello\n")
    assert done.returncode == 1 and "no answer" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_api_with_a_key(parrot: Parrot, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    with listening(create_app(parrot, lambda: "parrot", host="127.0.0.1", api_key="sk-1")) as url:
        assert piped(url, "hello\n", "--api-key", str(key)).stdout.startswith("[1] hello")
        done = piped(url, "hello\n")
        assert done.returncode == 1 and "needs its key" in done.stderr
        asked = [*SLIP, "generate", "hello", "--api", url, "--api-key", str(key)]
        assert subprocess.run(asked, capture_output=True, timeout=90).stdout.startswith(b"[1] hello")


class Terminal:
    """`slip chat` on a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background inherit that it is ignored
            os.execv(SLIP[0], [*SLIP, "chat", "--api", url])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def shows(self, text: str, seconds: float = 60) -> None:
        """Wait until the terminal shows `text`, and forget what it showed so far."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:
                    break
        assert text in self.seen, self.seen
        self.everything = self.seen
        self.seen = self.seen.partition(text)[2]

    def end(self) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:
                    time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("slip chat did not end")


def test_by_hand(url: str, parrot: Parrot) -> None:
    terminal = Terminal(url)
    terminal.shows("parrot")
    terminal.shows("> ")
    terminal.type("talk\n")
    terminal.shows("talk[1] talk")
    terminal.type("\x03")  # Ctrl-C
    terminal.shows("stopped")
    assert parrot.stopped.wait(10)
    terminal.shows("> ")
    terminal.type("hello\n")
    terminal.shows("[3] hello")
    assert "evil\x07" not in terminal.everything  # no control characters of the model
    terminal.shows("> ")
    terminal.type("half a line")
    terminal.shows("half a line")
    time.sleep(0.3)  # CPython misses an interrupt that comes before readline waits for the next key
    terminal.type("\x03")
    terminal.shows("> ")
    terminal.type("fail\n")
    terminal.shows("generation stopped")
    terminal.type("/help\n")
    terminal.shows("/save FILE")
    terminal.type("again\n")
    terminal.shows("[5] again")  # the failed question was taken back
    terminal.shows("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end() == 0
