"""How fast the exact products are, beside what the memory delivers and beside PyTorch's bfloat16.

    python bench/kernels.py [--rows 11264] [--cols 2048] [--tokens 512] [--rounds 41] [--json]

Contenders are interleaved, each walks through its own set of matrices, larger together than a cache, and the
median of all rounds counts. GB/s is the matrix (int8: 1 byte a weight, bfloat16: 2) over the time. Where there is a
GPU, its backends follow, on 1, 32 and 512 tokens.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ["OMP_WAIT_POLICY"] = "passive"  # or PyTorch's threads spin through the next contender's turn

import numpy as np
import torch

from sliplm import _core, field, kernels
from sliplm.edge.multiplier import Multiplier
from sliplm.exchange import masking
from sliplm.exchange.operator import Operator
from sliplm.field import P
from sliplm.kernels.cuda import TILE
from sliplm.prg import expand, fresh_key, uniform
from sliplm.split.blinding import Blinding
from sliplm.trusted.group import native_low_rank

EXCLUDES = (
    "excluded: packing (once, at start-up), the link, the pads; encoding with masking, decoding with the check, and "
    "the low-rank part are timed apart: blinded, two planes, two checks"
)
WORKING_SET = 1 << 27  # bytes per contender
RANK = 37  # of the trusted part that a split makes by default

Contender = Callable[[int], object]


def medians(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved; the first rounds, a fifth, warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + rounds // 5 + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(i)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[-rounds:]) for name, taken in times.items()}


def products(rows: int, cols: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    count = max(2, WORKING_SET // (rows * cols))
    cpu = next(name for name in kernels.available_backends() if name in ("native", "portable"))
    exact = [kernels.prepare(rng.integers(-128, 128, (rows, cols), np.int8), cpu) for _ in range(min(count, 32))]
    plain = [torch.randn(rows, cols).bfloat16() for _ in range(max(2, len(exact) // 2))]
    # from numpy, which asks for large pages, as the kernel does
    memory = [torch.from_numpy(rng.integers(0, 100, rows * cols // 4, np.int32)) for _ in exact]
    results: list[dict[str, object]] = []
    for threads in dict.fromkeys((1, 2, torch.get_num_threads())):
        torch.set_num_threads(threads)
        for t in (1, tokens):
            x = rng.integers(0, P, (t, cols)).astype(np.uint32)
            out, half = np.empty((t, rows), np.uint32), torch.randn(t, cols).bfloat16()
            contenders: dict[str, Contender] = {
                "exact": lambda i, x=x, out=out, n=threads: exact[i % len(exact)].product(x, out=out, threads=n),
                "bfloat16": lambda i, x=half: torch.nn.functional.linear(x, plain[i % len(plain)]),
            }
            if t == 1:
                contenders |= {
                    "read (sum)": lambda i: memory[i % len(memory)].view(torch.float32).sum(),
                    "read (max)": lambda i: memory[
                        (i + len(memory) // 2) % len(memory)
                    ].max(),  # not what sum just read
                }
            for name, seconds in medians(contenders, rounds if t == 1 else max(3, rounds // 8)).items():
                size = rows * cols * (2 if name == "bfloat16" else 1)
                results.append(
                    {
                        "what": name,
                        "threads": threads,
                        "tokens": t,
                        "ms": seconds * 1e3,
                        "GB/s": size / seconds / 1e9 if t == 1 else None,
                        "GMAC/s": rows * cols * t / seconds / 1e9 if not name.startswith("read") else None,
                    }
                )
    return results


def gpu(rows: int, cols: int, rounds: int) -> list[dict[str, object]]:
    """The GPU's backends, where there are any, beside a copy within its memory (bytes read and written).

    "alone" are the kernels, on vectors that are there already, many products in a row; "whole" is what a caller
    waits for.
    """
    rng = np.random.default_rng(2)
    results: list[dict[str, object]] = []
    backends = [name for name in kernels.available_backends() if name in ("triton", "cuda")]
    if backends:
        one, other = torch.zeros((2, 1 << 28), dtype=torch.int8, device="cuda")

        def copy(_: int) -> None:
            one.copy_(other)
            torch.cuda.synchronize()

        seconds = medians({"copy": copy}, rounds)["copy"]
        results.append({"what": "copy", "tokens": 0, "ms": seconds * 1e3, "GB/s": 2 * one.nbytes / seconds / 1e9})
    for name in backends:
        count = max(2, WORKING_SET // (rows * cols))
        matrices = [kernels.prepare(rng.integers(-128, 128, (rows, cols), np.int8), name) for _ in range(count)]
        for t in (1, 32, 512):
            x = rng.integers(0, P, (t, cols)).astype(np.uint32)
            there = torch.from_numpy(rng.integers(0, P, (t, cols + -cols % TILE), np.int32)).to(matrices[0]._q.device)

            def alone(_: int, there: torch.Tensor = there, matrices: list = matrices) -> None:
                for matrix in matrices:
                    matrix._multiply(there)
                torch.cuda.synchronize()

            def whole(_: int, x: np.ndarray = x, matrices: list = matrices) -> None:
                for matrix in matrices:
                    matrix.product(x)

            for what, seconds in medians({f"{name}, alone": alone, f"{name}, whole": whole}, rounds).items():
                seconds /= count
                speed = {"GB/s": rows * cols / seconds / 1e9, "GMAC/s": rows * cols * t / seconds / 1e9}
                results.append({"what": what, "tokens": t, "ms": seconds * 1e3, **speed})
    return results


def trusted(rows: int, cols: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    """The trusted side's part of one exchange, in microseconds a token, on every core."""
    rng = np.random.default_rng(1)
    outputs = rows // 2
    into, out = Blinding.random(cols, rng), Blinding.random(outputs, rng)
    u = rng.integers(0, P, (2, 2 * outputs)).astype(np.uint32)
    uq = rng.integers(0, P, (2, cols)).astype(np.uint32)
    scales = rng.random((2, outputs)).astype(np.float32)
    op = Operator(0, (2 * outputs, cols), 5000.0, scales, into, out, u, uq)
    factors = [[torch.randn(shape).bfloat16().float() for shape in ((cols, 48), (RANK, outputs))] for _ in range(64)]
    low_rank = [native_low_rank(b, [a], [None]) for b, a in factors] if _core.native else []
    results: list[dict[str, object]] = []
    for t in (1, 16, tokens):
        x, r = rng.normal(size=(t, cols)).astype(np.float32), rng.integers(0, P, (t, cols)).astype(np.uint32)
        answer = rng.integers(0, P, (t, 2 * outputs)).astype(np.uint32)
        image, inv_c, y = answer[::-1].copy(), np.ones(t), np.zeros((t, outputs), np.float32)
        expected = np.zeros((t, 2), np.uint32)  # the check fails, which takes as long
        contenders: dict[str, Contender] = {
            "encode": lambda i, x=x, r=r: masking.encode(op, x, r),
            "decode": lambda i, a=answer, b=image, c=inv_c, e=expected, y=y: masking.decode(op, a, b, c, e, y),
        }
        if low_rank:
            contenders["low-rank"] = lambda i, x=x, y=y: low_rank[i % len(low_rank)].apply(x, y)
        for name, seconds in medians(contenders, rounds).items():
            results.append({"what": name, "tokens": t, "us_per_token": seconds / t * 1e6})
    q = rng.integers(-128, 128, (rows, cols), np.int8)
    u = rng.integers(0, P, (2, rows)).astype(np.uint32)
    for name, run in {
        "project": lambda i: field.project(u, q),
        "prepare": lambda i: kernels.prepare(q),
    }.items():
        results.append({"what": name, "ms": medians({name: run}, 5)[name] * 1e3})
    return results


def helper(rows: int, cols: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    """What a helper does for a pad, a key's rows times the matrix, beside an edge's product with as many rows."""
    q = np.random.default_rng(2).integers(-128, 128, (rows, cols), np.int8)
    multiplier, key, r = Multiplier([kernels.prepare(q)], bytes(32)), fresh_key(), uniform(tokens, cols)
    contenders: dict[str, Contender] = {
        "edge": lambda i: multiplier.product(0, r),
        "helper": lambda i: multiplier.product(0, expand(key, 0, tokens, cols)),
    }
    return [
        {"what": name, "tokens": tokens, "rows_per_second": tokens / seconds}
        for name, seconds in medians(contenders, rounds).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 11264), ("cols", 2048), ("tokens", 512), ("rounds", 41)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = vars(parser.parse_args())
    as_json = args.pop("json")
    report = {
        "backend": kernels.describe(),
        **args,
        "excludes": EXCLUDES,
        "products": products(**args),
        "gpu": gpu(args["rows"], args["cols"], args["rounds"]),
        "trusted": trusted(**args),
        "helper": helper(**args),
    }
    if as_json:
        json.dump(report, sys.stdout, indent=1)
        return
    print(f"{report['backend']}; matrix {args['rows']} x {args['cols']}; medians of {args['rounds']}")
    print(EXCLUDES + "\n")
    print(f"{'':12}{'threads':>8}{'tokens':>8}{'ms':>10}{'GB/s':>8}{'GMAC/s':>8}")
    for row in report["products"]:
        numbers = "".join(f"{row[key]:8.1f}" if row[key] else f"{'':8}" for key in ("GB/s", "GMAC/s"))
        print(f"{row['what']:12}{row['threads']:8}{row['tokens']:8}{row['ms']:10.3f}{numbers}")
    for row in report["gpu"]:
        print(f"{row['what']:20}{row['tokens']:8}{row['ms']:10.3f}{row['GB/s']:8.0f}{row.get('GMAC/s', 0):10.0f}")
    print()
    for row in report["trusted"]:
        if "ms" in row:
            print(f"{row['what']:12}{row['ms']:10.1f} ms")
        else:
            print(f"{row['what']:12}{row['tokens']:8} tokens{row['us_per_token']:10.2f} us a token")
    for row in report["helper"]:
        print(f"{row['what']:12}{row['tokens']:8} tokens{row['rows_per_second']:10.0f} rows/s")


if __name__ == "__main__":
    main()
