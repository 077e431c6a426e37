"""The command `slip`: parse, call, print. Results go to stdout, progress and logs to stderr.

One file per group of commands; this one puts them together.
"""

from __future__ import annotations

import os
import sys

import typer

os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars; read when tqdm is first imported

from sliplm.cli import ask, bench, chat, demo, device, edge, evaluate, helper, inspect, plan, split, top, trusted
from sliplm.cli.common import fail
from sliplm.errors import SlipError
from sliplm.extras import advice

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The command `slip`: parse, call, print. Results go to stdout, progress and logs to stderr.",
    pretty_exceptions_enable=False,
)
for command in (
    plan.plan,
    plan.sensitivity,
    split.split,
    inspect.inspect,
    trusted.trusted,
    edge.edge,
    helper.helper,
    ask.generate,
    chat.chat,
    top.top,
    evaluate.evaluate,
    evaluate.attack,
    bench.bench,
    demo.demo,
):
    app.command()(command)
app.add_typer(device.app, name="device")


def main() -> None:
    """Run the command line; every expected failure is one sentence and a non-zero exit."""
    try:
        app(standalone_mode=True)
    except SlipError as error:
        fail(str(error))
    except ModuleNotFoundError as missing:  # an edge has fewer packages than the owner's commands need
        if (sentence := advice(missing.name, f"`slip {sys.argv[1]}`")) is None:
            raise
        fail(sentence)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}.")
    except MemoryError:
        fail("not enough memory.")
