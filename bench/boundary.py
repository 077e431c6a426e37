"""What a border in the clear gives away: the attack `boundary` on plans that need not have been split.

    python bench/boundary.py [--plans first:2,last:2] [--budget 8192] [--model smollm2]

Prints a line of JSON for each plan: by what the thief starts from, its perplexity against the tokens that it has seen
at the border. Where blocks are on the trusted side whole, its starts are those without the edge's part.
"""

from __future__ import annotations

import argparse
import json
import time

import transformers

from sliplm.attacks import boundary
from sliplm.attacks.stolen import trim
from sliplm.attacks.suite import read_data
from sliplm.attacks.training import perplexity
from sliplm.evaluate import text
from sliplm.open.blocks import block_list
from sliplm.planner import units
from sliplm.speed.models import find
from sliplm.split.places import places
from sliplm.split.source import load_whole
from sliplm.split.tokenizer import read_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plans", default="first:2,last:2")
    parser.add_argument("--budget", type=int, default=8192, help="tokens at the border; some of them choose")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", help="a public model of the same shape")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    source = find(options.model, None)  # type: ignore[arg-type]
    original, tokenizer = load_whole(source), read_tokenizer(source)
    base = load_whole(options.base) if options.base else None
    data = read_data(tokenizer, text.read_text(None), options.budget)
    for model in (original, base):
        if model is not None:
            trim(model, data.vocabulary)
    count = len(original.get_submodule(block_list(original)))
    known = perplexity(original, data.held)
    for plan in units.plans(options.plans):
        begin = time.perf_counter()
        found = boundary.attack(original, places(plan, count), data, options.rank, base)
        seconds = round(time.perf_counter() - begin)
        print(json.dumps({"plan": plan, "original": known, "seconds": seconds, "starts": found}), flush=True)


if __name__ == "__main__":
    main()
