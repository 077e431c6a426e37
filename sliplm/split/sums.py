"""Find layers whose outputs are only ever added up: in a parallel block, the ends of attention and of the MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class SumWatch(TorchDispatchMode):
    """Follows marked tensors through a model's operations.

    `pairs` holds the names whose tensors were added to each other before anything else was done to them. An addition to
    a third tensor does not count as anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, frozenset[str]] = {}
        self._alive: list[torch.Tensor] = []  # an id must not be reused
        self._met: set[frozenset[str]] = set()
        self._alone: set[str] = set()

    def mark(self, name: str, x: torch.Tensor) -> None:
        self._carry(x, frozenset([name]))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each name in one pair at most, and only if that is what happens to it always."""
        seen = [name for pair in self._met for name in pair]
        good = [p for p in self._met if len(p) == 2 and not p & self._alone and all(seen.count(n) == 1 for n in p)]
        return [(a, b) for a, b in map(sorted, good)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and not kwargs and isinstance(args[1], torch.Tensor):
            a, b = (self._names.get(id(x), frozenset()) for x in args)
            if args[0].shape == args[1].shape and (a or b):
                if a and b:
                    self._met.add(a | b)
                else:
                    self._carry(out, a | b)
                return out
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor):
                self._alone |= self._names.get(id(x), frozenset())
        return out

    def _carry(self, x: torch.Tensor, names: frozenset[str]) -> None:
        self._names[id(x)] = names
        self._alive.append(x)
