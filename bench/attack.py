"""Attack SmolLM2's plain and default split side by side: `make attack` writes attack.html and attack.json.

    python bench/attack.py [BUDGET] [METHOD ...]

BUDGET is the thief's training text in tokens (2048 if absent); all methods if none is named.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import transformers

from sliplm.demo import find_smollm2
from sliplm.evaluate import attack_report
from sliplm.evaluate.attacks import suite
from sliplm.split.split import Options, split

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = find_smollm2()
budget = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
started = time.perf_counter()


def tell(done: int, total: int) -> None:
    print(f"{done} of {total} steps, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


with tempfile.TemporaryDirectory() as scratch:
    directories = [Path(scratch) / "plain", Path(scratch) / "default"]
    split(model, directories[0], Options(camouflage=False, blinding=False))
    split(model, directories[1])
    result = suite.attack(directories, model, sys.argv[2:], budget, progress=tell)
    result["seconds"] = round(time.perf_counter() - started)
    attack_report.write(result, suite.spectra(directories, model), Path("attack.html"))
    Path("attack.json").write_text(json.dumps(result, indent=1) + "\n")
for name, lines in result["verdict"].items():
    print(Path(name).name, *lines, sep="\n  ")
