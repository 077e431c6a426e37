"""The numbers that the README quotes, measured on this machine: `make numbers`, about 15 minutes on two cores.

Agreement of the protected SmolLM2 with the original, what the stolen part is worth, whether what the edge sees is
uniform, how long a split takes, and how much memory the split of a 1.1-billion-parameter checkpoint (random weights,
bfloat16, in shards) needs. Speed is not measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import sliplm.trusted  # noqa: F401 - teaches Transformers to load trusted bundles
from sliplm.demo import find_smollm2
from sliplm.evaluate import agreement, text
from sliplm.exchange.link import Link
from sliplm.field import P


def slip(*arguments: object) -> tuple[dict[str, Any], float]:
    """Run a command with --json; its result, and its wall-clock seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sliplm.cli", *map(str, arguments), "--json"], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout), time.perf_counter() - started


class Recording(Link):
    """Keeps what the edge sees."""

    def __init__(self, inner: Link) -> None:
        self.inner, self.party = inner, inner.party
        self.seen: list[np.ndarray] = []

    def exchange(self, group: int, x: np.ndarray, own: Any) -> Any:
        self.seen.append(x.copy())
        return self.inner.exchange(group, x, own)

    def close(self) -> None:
        self.inner.close()


def masking(directory: Path) -> dict[str, Any]:
    """Everything the edge receives in two runs on one prompt: chi-square of its bits, and how often the runs agree."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "trusted").eval()
    model.slip.attach(directory / "edge")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "trusted")
    ids = agreement.windows(tokenizer, text.read_text(None), 128, 128)
    runs = []
    for _ in range(2):
        link = Recording(model.slip.default_link)
        with torch.inference_mode(), model.slip.using(link):
            model.generate(ids, max_new_tokens=8, do_sample=False)
        runs.append(np.concatenate([x.reshape(-1) for x in link.seen]))
    values = np.concatenate(runs)
    scores = {}
    for name, part in (("high", values >> 15), ("low", values & 0xFFFF), ("middle", (values >> 7) & 0xFFFF)):
        counts = np.bincount(part.astype(np.int64), minlength=1 << 16)
        expected = len(values) / len(counts)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        # For many degrees of freedom chi-square is normal with mean df and variance 2 df.
        df = len(counts) - 1
        scores[name] = {"chi_square": chi2, "df": df, "z": (chi2 - df) / math.sqrt(2 * df)}
    return {
        "elements": len(values),
        "canonical": bool(values.max() < P),
        "bits": scores,
        "equal_positions_in_two_runs": int((runs[0] == runs[1]).sum()),
        "expected_by_chance": len(runs[0]) / P,
    }


def large_checkpoint(directory: Path) -> None:
    """22 Llama blocks of width 2048 with random weights, written shard by shard."""
    from safetensors.torch import save_file
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    with FakeTensorMode():
        shapes = {k: tuple(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    where: dict[str, str] = {}
    names = list(shapes)
    for shard, start in enumerate(range(0, len(names), 24)):
        part = names[start : start + 24]
        save_file(
            {n: torch.randn(shapes[n]).mul_(0.02).to(torch.bfloat16) for n in part},
            directory / f"model-{shard:05}.safetensors",
            {"format": "pt"},
        )
        where |= dict.fromkeys(part, f"model-{shard:05}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text for perplexity and KL")
    parser.add_argument("--greedy", type=int, default=20, help="prompts for greedy text")
    parser.add_argument("--skip-large", action="store_true", help="leave out the 1.1-billion-parameter split")
    options = parser.parse_args()
    model = find_smollm2()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for planes in (2, 1):
            directory = Path(scratch) / f"planes{planes}"
            _, seconds = slip("split", model, "-o", directory, "--planes", planes)
            greedy = options.greedy if planes == 2 else 0
            report, _ = slip(
                "evaluate", directory, "--reference", model, "--tokens", options.tokens, "--greedy", greedy
            )
            result[f"planes {planes}"] = {"split_seconds": round(seconds, 1), **report}
            print(json.dumps(result[f"planes {planes}"], indent=1), file=sys.stderr)
        result["masking"] = masking(Path(scratch) / "planes2")
        print(json.dumps(result["masking"], indent=1), file=sys.stderr)
    if not options.skip_large:
        with tempfile.TemporaryDirectory() as scratch:
            large_checkpoint(Path(scratch) / "model")
            # A process of its own, so that the peak is that of this split and of nothing before it.
            code = (
                "import resource, sys, pathlib, time; started = time.perf_counter();"
                "from sliplm.split.model import split_model; split_model(sys.argv[1], pathlib.Path(sys.argv[2]));"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - started)"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, f"{scratch}/model", f"{scratch}/out"], stdout=subprocess.PIPE, check=True
            )
            peak, seconds = done.stdout.split()
            result["split of 1.1B"] = {"peak_bytes": int(peak), "seconds": round(float(seconds), 1)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
