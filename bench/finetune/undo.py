"""Is the fine-tune's blinding undone with the public base? Today's, and format 2's on the same matrices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from sliplm.attacks import gram, matrices, unblinding
from sliplm.attacks.stolen import NONE, Oracles, Stolen, guess_scales
from sliplm.split.blinding import blind, stored
from sliplm.split.planes import dequantise, quantise

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from format2 import Rotation

EVERY = 15  # groups: all kinds of matrices, and the head
SCALES = Oracles(scales=True)


def tried(stolen: Stolen, public: Any, based: bool) -> Iterator[dict[str, Any]]:
    """Attack every EVERY-th group of a split of a fine-tune of `public`: without an oracle, with true row scales, and
    with those the same matrix under format 2's blinding. `sure` is what the thief knows of his own result, 0 to 1."""
    groups = stolen.groups(public)
    with safe_open(stolen.trusted / "model.safetensors", "pt") as file:
        for number in range(0, len(groups), EVERY):
            group = groups[number]
            size = float(torch.cat([matrices.weight(public, m).flatten() for m in group]).square().mean().sqrt())
            members = [matrices.weight(public, m) for m in group]
            rank, planes = stolen.plan[number].rank, stolen.plan[number].planes
            known = torch.cat(members if based else [gram.without_leading(w, rank, filled=False) for w in members])
            new = stored(file.get_tensor, group[0].name)
            rng = np.random.default_rng(number)
            old = Rotation.random(known.shape[1], rng), Rotation.random(known.shape[0], rng)
            held = stolen.matrix(number, group, Oracles(scales=True, blinding=True), file, size)
            q, scales = quantise(blind(held.double(), *old).float(), planes)
            seen = {
                "today": (stolen.matrix(number, group, NONE, file, size), new, False),
                "today, row scales given": (stolen.matrix(number, group, SCALES, file, size), new, True),
                "format 2": (dequantise(q, guess_scales(q, planes, size)), old, False),
                "format 2, row scales given": (dequantise(q, scales), old, True),
            }
            for what, (matrix, secret, given) in seen.items():
                guess = unblinding.attack(matrix, known, not based, given)
                yield {"group": group[0].name, "blinding": what, "sure": guess.sure} | guess.score(*secret)._asdict()
