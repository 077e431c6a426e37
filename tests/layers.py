"""One protected matrix with all that either side has of it."""

from __future__ import annotations

import numpy as np
import torch
from loading import pool_of

from sliplm import kernels
from sliplm.exchange import check
from sliplm.exchange.operator import Operator
from sliplm.split.blinding import Blinding, blind, unblind
from sliplm.split.matrices import row_norm
from sliplm.split.planes import dequantise, quantise

ROWS, COLUMNS = 40, 30


class Layer:
    """A matrix, split and blinded, and all that either side has of it."""

    def __init__(self, planes: int = 2) -> None:
        generator = torch.Generator().manual_seed(planes)
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        inner, outer = Blinding.random(COLUMNS), Blinding.random(ROWS)
        q, scales = quantise(blind(weight, inner, outer), planes)
        self.q = q.numpy()
        self.weight = unblind(dequantise(q, scales), inner, outer).double().numpy()
        self.op = Operator(0, (len(q), COLUMNS), row_norm(q), scales.numpy(), inner, outer, *check.secrets(q.numpy()))
        self.matrices = [kernels.prepare(q.numpy())]
        self.pads = pool_of(self.matrices, depth=0)

    def own(self, x: np.ndarray) -> np.ndarray:
        return np.full((len(x), ROWS), 3.0, np.float32) + x[:, :1]

    def wanted(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weight.T + self.own(x)


def inputs(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, COLUMNS)).astype(np.float32)
