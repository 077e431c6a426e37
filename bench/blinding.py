"""What blinding costs the trusted side: its share of one exchange of one token, on one thread.

    python bench/blinding.py [--rounds 200]

An exchange here is encode, the edge's product (two planes) and decode with its check, without the link, the low-rank
part and the pads, so a real exchange is longer and the share smaller. Variants are interleaved; the fastest round of
each counts, as others may use the machine.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from sliplm import kernels
from sliplm.exchange import masking
from sliplm.exchange.operator import Operator
from sliplm.field import P
from sliplm.split.blinding import Blinding

LAYERS = {  # rows without planes, columns
    "hidden 576: q k v": (960, 576),
    "hidden 576: o": (576, 576),
    "hidden 576: gate up": (3072, 576),
    "hidden 576: down": (576, 1536),
    "hidden 576: head": (49152, 576),
    "hidden 2048: q k v": (3072, 2048),
    "hidden 2048: o": (2048, 2048),
    "hidden 2048: gate up": (16384, 2048),
    "hidden 2048: down": (2048, 8192),
}


def measure(rows: int, columns: int, rounds: int) -> tuple[float, float, float]:
    """Fastest seconds of the product, of encode and decode without blinding, and with it."""
    rng = np.random.default_rng(0)
    matrix = kernels.prepare(rng.integers(-127, 128, (2 * rows, columns), np.int8))
    x, r = rng.normal(size=(1, columns)).astype(np.float32), rng.integers(0, P, (1, columns)).astype(np.uint32)
    answer, image = (rng.integers(0, P, (1, 2 * rows)).astype(np.uint32) for _ in range(2))
    scales, inv_c = rng.random((2, rows)).astype(np.float32), np.ones(1)
    u, uq = (rng.integers(0, P, (2, n)).astype(np.uint32) for n in (2 * rows, columns))
    into, out = Blinding.random(columns, rng), Blinding.random(rows, rng)
    plain, blinded = (
        Operator(0, (2 * rows, columns), 5000.0, scales, *bases, u, uq) for bases in ((None, None), (into, out))
    )
    y, expected = np.zeros((1, rows), np.float32), np.zeros((1, 2), np.uint32)

    def edge() -> None:
        matrix.product(r, threads=1)

    def own(op: Operator) -> None:
        masking.encode(op, x, r)
        masking.decode(op, answer, image, inv_c, expected, y)  # the check fails, which takes as long

    best = [float("inf")] * 3
    for _ in range(rounds):
        for i, run in enumerate((edge, lambda: own(plain), lambda: own(blinded))):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1], best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{kernels.describe()}\n{'layer':22}{'exchange, us':>14}{'blinding, us':>14}{'share':>8}")
    for name, shape in LAYERS.items():
        edge, plain, blinded = measure(*shape, rounds)
        extra = blinded - plain
        print(f"{name:22}{(edge + blinded) * 1e6:14.1f}{extra * 1e6:14.1f}{extra / (edge + blinded):8.1%}")


if __name__ == "__main__":
    main()
