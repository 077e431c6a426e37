"""How far a public base undoes the blinding of SmolLM2's matrices: today's, and that of bundle format 2.

    python bench/unblinding.py [MATRIX ...] [--eps 0.005 ...] [--split base default] [--blinding new old] [--guessed]

MATRIX: qkv3, o3, gateup3, down3, ... of layers 3, 10, 15, 20, 28, or head; all by default. Or like2048 for a random
matrix of that size with localised singular vectors. The fine-tune is synthetic: of full rank, relative size eps,
singular values i^-0.6, random directions. The thief gets the public model, and the scales of all rows unless --guessed.
Chance is what the same guess scores against fresh blindings of the same kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sliplm.attacks import gram, matrices, unblinding
from sliplm.attacks.stolen import guess_scales
from sliplm.demo import find_smollm2
from sliplm.split.base import divide
from sliplm.split.blinding import Blinding, blind
from sliplm.split.groups import find_groups
from sliplm.split.planes import dequantise, quantise
from sliplm.split.source import load_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from format2 import Rotation, trained_like

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
    parser.add_argument("--guessed", action="store_true")
    parser.add_argument("--planes", type=int, choices=(1, 2), default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_whole(find_smollm2())
    groups = {group[0].name: group for group in find_groups(model)}
    known = {f"{kind}{n}": groups[f"model.layers.{n}.{where}"] for n in LAYERS for kind, where in KINDS.items()}
    known["head"] = groups["lm_head"]
    print("matrix    split      eps   blinding entries  aligned  signs rotation         chance  sure      s")
    found: dict[str, list[unblinding.Score]] = {}
    for eps, name in product(arguments.eps, arguments.matrix or known):
        if name.startswith("like"):
            public = [trained_like(int(name[4:]), np.random.default_rng(2))]
        else:
            public = [matrices.weight(model, m) for m in known[name]]
        for how in arguments.split:
            edge, base = edges(public, eps, how == "base")
            for kind, normal in (("new", False), ("new", True), ("old", False)):
                if kind not in arguments.blinding:
                    continue
                start = time.perf_counter()
                rng = np.random.default_rng(1)
                truth, other = ([BLINDINGS[kind].random(n, rng) for n in edge.T.shape] for _ in range(2))
                stolen = read(blind(edge.double(), *truth).float(), arguments.planes, not arguments.guessed)
                guess = unblinding.attack(stolen, base, how != "base", not arguments.guessed, normal)
                score, chance = guess.score(*truth), guess.score(*other)
                found.setdefault(kind, []).append(score)
                print(
                    f"{name:10}{how:9}{eps:6.2%}  {kind:9}{'normal' if normal else 'constant':8}{score.alignment:9.3f}"
                    f"{score.signs:7.3f}{score.rotation:9.4f}{chance.signs:8.3f}{chance.rotation:7.4f}"
                    f"{guess.sure:6.2f}{time.perf_counter() - start:7.1f}",
                    flush=True,
                )
    for kind, scores in found.items():
        most = unblinding.Score(*map(max, zip(*scores, strict=True)))
        fell = sum(score.rotation > 0.3 for score in scores)
        worst_of = ", ".join(f"{name} {value:.4f}" for name, value in most._asdict().items())
        print(f"{kind}: {fell} of {len(scores)} fell; at most: {worst_of}")


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


def read(blinded: torch.Tensor, planes: int, scales: bool) -> torch.Tensor:
    """What a thief reads of it in so many planes."""
    q, true = quantise(blinded, planes)
    return dequantise(q, true if scales else guess_scales(q, planes, 1.0))


if __name__ == "__main__":
    main()
