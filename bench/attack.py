"""Attack SmolLM2's plain and default split side by side: `make attack` writes attack.html and attack.json.

    python bench/attack.py [BUDGET] [METHOD ...]

BUDGET is the thief's text in tokens (2048 if absent); all methods if none is named. The two splits and finished
training runs are kept in build/attack, and used again, so an interrupted run goes on; remove it to begin anew.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import transformers

from sliplm.attacks import report as attack_report
from sliplm.attacks import suite
from sliplm.demo import find_smollm2
from sliplm.split.model import Options, split_model

WORK = Path("build/attack")


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    attack_report.require_plots()
    model = find_smollm2()
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    began = time.perf_counter(), time.process_time()

    def tell(done: int, total: int) -> None:
        print(f"{done} of {total} steps, {time.perf_counter() - began[0]:.0f} s", file=sys.stderr, flush=True)

    WORK.mkdir(parents=True, exist_ok=True)
    directories = [WORK / "plain", WORK / "default"]
    for directory, options in zip(directories, (Options(camouflage=False, blinding=False), Options()), strict=True):
        if not directory.exists():
            split_model(model, directory, options)
    result = suite.attack(directories, model, sys.argv[2:], budget, progress=tell, finished=WORK / "runs.jsonl")
    result["seconds"]["all"] = [round(time.perf_counter() - began[0]), round(time.process_time() - began[1])]
    attack_report.write(result, suite.spectra(directories, model), Path("attack.html"))
    Path("attack.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, lines in result["verdict"].items():
        print(Path(name).name, *lines, sep="\n  ")
    print("{} s, of which {} s of processor time".format(*result["seconds"]["all"]))


if __name__ == "__main__":
    main()
