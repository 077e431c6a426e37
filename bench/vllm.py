"""Throughput of the protected model in vLLM against that of the same model, unprotected, in the same vLLM, by turns:
`make bench-vllm`, or `python -m bench.vllm smollm2 llama-1.1b` in the environment of requirements-vllm.txt.

All run eagerly. The edge is a process on this machine, over TLS; one plane; pads are made beforehand, and before each
turn, when nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sliplm.processes import process
from sliplm.registry import authority
from sliplm.speed.models import find, protect

STREAMS = (1, 8, 16)
PROMPT = 8
CACHE_BYTES = 400 << 20


@contextmanager
def worker(model: Path | str, dtype: str, address: str = "") -> Iterator[Any]:
    """This file as a process that decodes when it is asked to, with vLLM and `model`."""
    command = [sys.executable, "-m", "bench.vllm", "--worker", str(model), dtype]
    listen = {"SLIP_LISTEN": address} if address else {}
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_STREAM": "ext://sys.stderr", **listen}
    settings |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}
    )
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None and stdout is not None

    def ask(**question: int) -> float:
        """Seconds."""
        print(json.dumps(question), file=stdin, flush=True)
        while not (line := stdout.readline()).startswith("seconds "):
            if not line:
                raise RuntimeError(f"vLLM with {model} has ended")
        return float(line.split()[1])

    try:
        ask(streams=0, tokens=0)  # when it has loaded
        yield ask
    finally:
        child.kill()
        child.wait()


def work(model: str, dtype: str) -> None:
    """The worker."""
    from vllm import LLM, SamplingParams

    from sliplm.engine.vllm.edges import Edges, making

    runtimes: list[Any] = []

    def make(directory: Path, runtime: Any) -> Edges:
        runtimes.append(runtime)
        return Edges(directory, runtime)

    making.set(make)
    llm = LLM(model, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=max(STREAMS),
              max_model_len=256, kv_cache_memory_bytes=CACHE_BYTES, enable_prefix_caching=False)  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        for runtime in runtimes:
            needed = asked["streams"] * (PROMPT + asked["tokens"])
            runtime.pool.resize(needed)
            runtime.pool.wait(needed)
            runtime.pool.resize(0)
        if not asked["streams"]:
            print("seconds 0", flush=True)
            continue
        prompts = [
            {"prompt_token_ids": [(7 * i + j) % 200 + 1 for j in range(PROMPT)]} for i in range(asked["streams"])
        ]
        how = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, how, use_tqdm=False)
        print("seconds", time.perf_counter() - start, flush=True)


def checkpoint(name: str, source: str, keep: Path) -> str:
    """`source` as a directory of safetensors, which is what vLLM reads."""
    if not source.endswith(".gguf"):
        return source
    directory = keep / f"{name}-checkpoint"
    if not directory.exists():
        from sliplm.split.source import load_whole

        model = load_whole(source)
        model.hf_quantizer = None  # it is in float32 by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(directory)
    return str(directory)


def measure(name: str, keep: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each contender, all streams together, by the number of streams."""
    source = find(name, keep)
    bundle = protect(name, source, 1, 16, keep, None)
    identity = keep / f"{name}.identity"
    if not identity.exists():
        shutil.rmtree(bundle / "trusted" / "authority", ignore_errors=True)
        authority.add_device(bundle / "trusted" / "authority", name, identity)
    plain, address = checkpoint(name, source, keep), "127.0.0.1:7499"
    with ExitStack() as running:
        asks = {"protected": running.enter_context(worker(bundle / "trusted", "float32", address))}
        common = ("--trusted", address, "--identity", identity, "--api", "")
        running.enter_context(process("edge", bundle / "edge", *common))
        for dtype in ("float32", "bfloat16"):
            asks[f"unprotected, {dtype}"] = running.enter_context(worker(plain, dtype))
        speeds: dict[str, dict[int, list[float]]] = {who: {n: [] for n in STREAMS} for who in asks}
        for turn in range(-1, rounds):  # the first warms up
            for streams in STREAMS:
                for who, ask in asks.items():
                    seconds = ask(streams=streams, tokens=tokens if turn >= 0 else 2)
                    if turn >= 0:
                        speeds[who][streams].append(streams * tokens / seconds)
    return {who: {n: median(values) for n, values in by.items()} for who, by in speeds.items()}


def show(name: str, speeds: dict[str, dict[int, float]]) -> None:
    print(f"{name:24}" + "".join(f"{f'{n} streams':>20}" for n in STREAMS))
    for who, by in speeds.items():
        shares = (f"{by[n]:10.1f} ({speeds['protected'][n] / by[n]:4.2f})" for n in STREAMS)
        print(f"{who:24}" + "".join(f"{share:>20}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second; in brackets, the protected model's share of them.")
    parser.add_argument("models", nargs="*", default=["smollm2", "llama-1.1b"])
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "slip-bench")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        work(*said.models)
        return
    said.keep.mkdir(parents=True, exist_ok=True)
    found = {name: measure(name, said.keep, said.tokens, said.rounds) for name in said.models}
    if said.json:
        print(json.dumps(found))
        return
    for name, speeds in found.items():
        show(name, speeds)


if __name__ == "__main__":
    main()
