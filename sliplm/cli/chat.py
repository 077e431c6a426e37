"""`slip chat`: a conversation in the terminal, through an edge's API."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sliplm.cli.common import Api, ApiKey, err, fail, plain, printable, read_api_key
from sliplm.errors import SlipError

COMMANDS = """\
  /reset          forget the conversation
  /system TEXT    instructions to the model from now on; without TEXT, none
  /save FILE      write the conversation as JSON, as OpenAI's clients take it
  /help           this list
  /quit           leave; Ctrl-D does too
  Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


class Conversation:
    """What was said so far. A question without an answer is taken back, so that the roles keep alternating."""

    def __init__(self, api: str, key: str | None, options: dict[str, Any], system: str) -> None:
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._api, self._key, self._options = api, key, options

    def everything(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def ask(self, question: str) -> Generator[str, None, None]:
        """Stream the answer. It counts as said as far as it came when the iterator is closed, but not if it fails.

        Raises LinkError.
        """
        from sliplm.edge.client import stream

        self.messages.append({"role": "user", "content": question})
        said = ""
        chunks = stream(self._api, self.everything(), self._options, key=self._key)
        try:
            with contextlib.closing(chunks):
                for chunk in chunks:
                    said += chunk.text
                    yield chunk.text
        except SlipError:
            said = ""
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def save(self, path: Path) -> None:
        """Write all messages to `path`, whole or not at all. Raises OSError."""
        text = json.dumps(self.everything(), indent=2, ensure_ascii=False) + "\n"
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            try:
                file.write(text)
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def chat(
    api: Api = "http://127.0.0.1:8411",
    system: Annotated[str, typer.Option(help="Instructions to the model.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    api_key: ApiKey = None,
) -> None:
    """Talk with the model. Lines from a pipe are asked one after the other, and only the answers are printed."""
    from sliplm.edge.client import model

    key = read_api_key(api_key)
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    options |= {k: v for k, v in {"top_p": top_p, "seed": seed}.items() if v is not None}
    name = model(api, key)
    conversation = Conversation(api, key, options, system)
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):
            import readline  # arrow keys and earlier lines in input()

            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
        err().print(f"[bold]{plain(name)}[/bold] at {api}. /help lists the commands.", style="dim")
    for line in _lines(by_hand):
        try:
            if line.startswith("/"):
                if not _command(conversation, line, by_hand):
                    break
            elif line:
                _answer(conversation, line, by_hand)
        except SlipError as error:
            if not by_hand:
                raise
            err().print(f"slip: {error}", style="red", markup=False)


def _lines(by_hand: bool) -> Iterator[str]:
    """What the user says, without the space around it. Ctrl-C clears a line that is being written."""
    line = ""
    while True:
        try:
            part = input("\001\x1b[1;36m\002> \001\x1b[0m\002" if by_hand and not line else "")
            part.encode()  # in some locales, bytes that are no text come in as lone surrogates
        except EOFError:
            if line.strip():
                yield line.strip()
            if by_hand:
                print()
            return
        except UnicodeError:
            fail("what comes in is not UTF-8 text.")
        except KeyboardInterrupt:
            if not by_hand:
                raise
            print()
            line = ""
            continue
        if part.endswith("\\"):
            line += part[:-1] + "\n"
            continue
        yield (line + part).strip()
        line = ""


def _answer(conversation: Conversation, question: str, by_hand: bool) -> None:
    """Print the answer as it comes. Raises LinkError."""
    pieces = conversation.ask(question)
    try:
        with err().status("", spinner="dots") if by_hand else contextlib.nullcontext():
            first = next(pieces, "")
        print(printable(first, by_hand), end="", flush=True)
        for piece in pieces:
            print(printable(piece, by_hand), end="", flush=True)
        print("\n" if by_hand else "", flush=True)
    except KeyboardInterrupt:
        if not by_hand:
            raise
        pieces.close()
        print(flush=True)
        err().print("stopped", style="dim")
    except SlipError:
        print(flush=True)  # what came of the answer, if anything, ends here
        raise


def _command(conversation: Conversation, line: str, by_hand: bool) -> bool:
    """Obey a line that starts with a slash; whether to go on. Raises SlipError."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.messages.clear()
        said = "forgotten"
    elif name == "/system":
        conversation.system = rest
        said = "noted" if rest else "no instructions any more"
    elif name == "/save" and rest:
        try:
            conversation.save(Path(rest).expanduser())
        except OSError as error:
            raise SlipError(f"cannot write {rest}: {error.strerror or error}.") from None
        said = f"written to {rest}"
    elif name == "/help":
        said = COMMANDS
    else:
        raise SlipError(f"{line!r} is not a command: /help lists them.")
    if by_hand:
        err().print(said, style="dim", markup=False)
    return True
