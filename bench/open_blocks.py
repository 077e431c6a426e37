"""How long an edge takes for open blocks: a run of SmolLM2's shape with random weights, on the GPU if there is one, and
on the CPU.

    python bench/open_blocks.py [--blocks 28] [--prompt 256] [--tokens 40]

Prints a line of JSON for each device: the shortest of three prompts, and the median of tokens that follow one. The
network, and the trusted side's blocks, are not in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from sliplm.bundle import EdgeBundle
from sliplm.open import model as open_model
from sliplm.split.model import Options, split_model

TRUSTED = 2  # blocks before the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=TRUSTED + options.blocks, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=512, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
        split_model(str(place / "model"), place / "split", Options(plan=f"trusted:{TRUSTED}"), check=False)
        bundle = EdgeBundle.open(place / "split" / "edge")
        there = torch.cuda.is_available
        for device in ("cuda", "cpu") if there() else ("cpu",):
            torch.cuda.is_available = there if device == "cuda" else lambda: False
            (run,) = open_model.load(bundle)
            print(json.dumps({"device": device, **_measure(run, options.prompt, options.tokens)}), flush=True)


def _measure(run: Any, prompt: int, tokens: int) -> dict[str, float]:
    x = np.random.default_rng(0).normal(size=(max(prompt, tokens), run.width)).astype(np.float32)
    cache = run.new_cache()

    def seconds(first: int, count: int) -> float:
        begin = time.perf_counter()
        run.compute(x[first : first + count], cache)
        return time.perf_counter() - begin

    prompts = []
    for _ in range(3):
        run.cut(cache, 0)
        prompts.append(seconds(0, prompt))
    one = median(seconds(i, 1) for i in range(tokens))
    return {"threads": torch.get_num_threads(), "prompt_ms": 1e3 * min(prompts), "token_ms": 1e3 * one}


if __name__ == "__main__":
    main()
