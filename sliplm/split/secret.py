"""Randomness that must stay secret: straight from the operating system, never from a seeded generator."""

from __future__ import annotations

import os

import numpy as np
import torch


def normal(*shape: int) -> torch.Tensor:
    """Independent standard normal float64 values of the given shape (inverse transform of 53-bit uniforms)."""
    count = int(np.prod(shape))
    words = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) / float(1 << 53)
    normals: torch.Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return normals.reshape(shape)


def choice(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` draws with replacement from the 1-D tensor `values`."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    # The modulo bias is below len(values) / 2^64.
    return values[torch.from_numpy((words % np.uint64(len(values))).astype(np.int64))]
