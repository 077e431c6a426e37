"""How far a public base undoes the blinding of SmolLM2's matrices: today's, and that of bundle format 2.

    python bench/unblinding.py [MATRIX ...] [--eps 0.005 ...] [--split base default] [--blinding new old] [--scales-unknown]

MATRIX: qkv3, o3, gateup3, down3, ... of layers 3, 10, 15, 20, 28, or head; all by default. The fine-tune is synthetic: of full
rank, relative size eps, singular values i^-0.6, random directions. The thief gets the public model, and the scales of
all rows unless --scales-unknown. Chance is what the same guesses score against fresh blindings of the same kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sliplm.demo import find_smollm2
from sliplm.evaluate.attacks import gram, matrices, unblinding
from sliplm.evaluate.attacks.stolen import guess_scales
from sliplm.split.base import divide
from sliplm.split.blinding import Blinding, blind
from sliplm.split.groups import Group, blocks, find_groups, size
from sliplm.split.planes import dequantise, quantise
from sliplm.split.source import load_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from format2 import Rotation  # noqa: E402

LAYERS = (3, 10, 15, 20, 28)
KINDS = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gateup": "mlp.gate_proj", "down": "mlp.down_proj"}
EPS = (0.0005, 0.005, 0.02, 0.05, 0.1)
RANK = 16
BLINDINGS: dict[str, Any] = {"new": Blinding, "old": Rotation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", nargs="*")
    parser.add_argument("--eps", type=float, nargs="+", default=EPS)
    parser.add_argument("--split", nargs="+", choices=("base", "default"), default=("base", "default"))
    parser.add_argument("--blinding", nargs="+", choices=BLINDINGS, default=tuple(BLINDINGS))
    parser.add_argument("--scales-unknown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_whole(find_smollm2())
    groups = {group[0].name: group for group in find_groups(model)}
    known = {f"{kind}{n}": groups[f"model.layers.{n}.{where}"] for n in LAYERS for kind, where in KINDS.items()}
    known["head"] = groups["lm_head"]
    print(f"{'matrix':10}{'split':9}{'eps':>7} {'blinding':9}{'entries':9}{'aligned':>8}{'signs':>7}{'rotation':>9}{'chance':>14}{'sure':>6}{'s':>7}")
    worst: dict[str, list[unblinding.Score]] = {}
    for eps in arguments.eps:
        for name in arguments.matrix or known:
            public = [matrices.weight(model, m) for m in known[name]]
            for how in arguments.split:
                edge, base = edges(public, eps, how == "base")
                for kind in arguments.blinding:
                    for normal in (False, True) if kind == "new" else (False,):
                        start = time.perf_counter()
                        rng = np.random.default_rng(1)
                        truth, other = ([BLINDINGS[kind].random(n, rng) for n in edge.T.shape] for _ in range(2))
                        stolen = read(blind(edge.double(), *truth).float(), not arguments.scales_unknown)
                        guesses = (0.1,) if normal else unblinding.GUESSES  # normal entries: no guess finds anything
                        guess = unblinding.attack(stolen, base, how != "base", not arguments.scales_unknown, normal, guesses)
                        score, chance = guess.score(*truth), guess.score(*other)
                        worst.setdefault(kind, []).append(score)
                        entries = "normal" if normal else "constant"
                        print(
                            f"{name:10}{how:9}{eps:7.2%} {kind:9}{entries:9}{score.alignment:8.3f}{score.signs:7.3f}"
                            f"{score.rotation:9.4f}{chance.signs:7.3f}{chance.rotation:7.4f}{guess.sure:6.2f}"
                            f"{time.perf_counter() - start:7.1f}",
                            flush=True,
                        )
    for kind, scores in worst.items():
        most = unblinding.Score(*map(max, zip(*scores, strict=True)))
        fell = sum(s.rotation > 0.3 for s in scores)
        print(f"{kind}: {fell} of {len(scores)} fell; at most: alignment {most.alignment:.3f}, signs {most.signs:.3f}, rotation {most.rotation:.4f}")


def edges(public: list[torch.Tensor], eps: float, base: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the edge holds of a fine-tune of the members `public`, before blinding, and what the thief takes it for."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    held = [divide(w + difference(w, eps, rng), RANK, True, generator, w if base else None)[2] for w in public]
    known = public if base else [gram.without_leading(w, RANK, filled=False) for w in public]
    return torch.cat(held), torch.cat(known)


def difference(weight: torch.Tensor, eps: float, rng: np.random.Generator) -> torch.Tensor:
    """A full-rank fine-tune of `weight` (N, K), of `eps` times its norm."""
    rank = min(weight.shape)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank), np.float32))[0] for n in weight.shape)
    found = torch.from_numpy((left * (np.arange(rank, dtype=np.float32) + 1) ** -0.6) @ right.T)
    return found * (eps * weight.norm() / found.norm())


def read(blinded: torch.Tensor, scales: bool) -> torch.Tensor:
    """What a thief reads of it in two planes."""
    q, true = quantise(blinded, 2)
    return dequantise(q, true if scales else guess_scales(q, 2, 1.0))


if __name__ == "__main__":
    main()
