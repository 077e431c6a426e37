"""The protected layers of a model that vLLM runs: what they load, and what they compute with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.forward_context import get_forward_context, is_forward_context_available

from sliplm import bundle
from sliplm.engine.vllm.edges import Runs, making
from sliplm.errors import BundleError, NumericsError, SlipError, UnsupportedModelError
from sliplm.split.plan import GroupPlan
from sliplm.trusted.group import ProtectedGroup
from sliplm.trusted.install import assemble

Rows = NDArray[np.float32]


class Layers:
    """All protected layers of the model of DIR/trusted, whose digests are checked here. Raises BundleError.

    Once the last of them is loaded, edges may connect.
    """

    def __init__(self, directory: Path, plan: Sequence[GroupPlan]) -> None:
        self._directory, self._plan = directory, plan
        self._digest = bytes.fromhex(bundle.open_trusted(directory).edge_digest)
        self._number = {name: number for number, group in enumerate(plan) for name in group.members}
        self._parts: list[Part] = []
        self._unloaded = 0
        self._dummy = self._served = False
        self.tensors: dict[str, torch.Tensor] = {}
        self.edges: Runs | None = None

    def claim(self, members: Sequence[str]) -> Part:
        """The layer that computes what `members` do, one above the other. Raises UnsupportedModelError if they are not
        whole groups of the split."""
        numbers = list(dict.fromkeys(self._number[name] for name in members))
        groups = [self._plan[number] for number in numbers]
        if [name for group in groups for name in group.members] != list(members) or any(
            g.kind == "sum" for g in groups
        ):
            raise UnsupportedModelError(
                f"vLLM computes {members[0]} together with other layers than this split does, so it cannot run it; "
                "`slip trusted` can."
            )
        self._parts.append(Part(self, members, numbers))
        self._unloaded += 1
        return self._parts[-1]

    def loaded(self) -> None:
        """One more layer is. With the last, all are bound."""
        self._unloaded -= 1
        if self._unloaded:
            return
        claimed = {name for part in self._parts for name in part.members}
        if missing := self._number.keys() - claimed:
            raise UnsupportedModelError(f"vLLM's model has no layer {min(missing)}, which the bundle protects.")
        try:
            runtime, groups = assemble([(g.members, False) for g in self._plan], self.tensors, self._digest)
        except KeyError as error:
            raise BundleError(f"{self._directory} lacks the tensor {error} of a protected layer.") from None
        self.tensors = {}
        for part in self._parts:
            part.groups = [group for number in part.numbers if isinstance(group := groups[number], ProtectedGroup)]
        self.edges = making.get()(self._directory, runtime)

    def is_dummy(self) -> bool:
        """Whether this is no step of a request, but a trial run of vLLM's, for which it has not made what attention
        needs: its own layers then answer zeros, too. A head is called after the other layers, without that sign.

        Raises SlipError for one after the first real step: vLLM has none then, and zeros would be a wrong text."""
        if is_forward_context_available():
            self._dummy = get_forward_context().attn_metadata is None
        if self._dummy and self._served:
            raise SlipError("vLLM ran a step without what attention needs, after it had begun to serve.")
        self._served = not self._dummy
        return self._dummy


class Part:
    """One layer of vLLM's: (..., K) to (..., sum N), what its `members` give side by side.

    Attributes:
        numbers: of the groups. groups: bound to what they compute with, once all is loaded.
    """

    def __init__(self, layers: Layers, members: Sequence[str], numbers: Sequence[int]) -> None:
        self.members, self.numbers = list(members), list(numbers)
        self.groups: list[ProtectedGroup] = []
        self._layers = layers
        self._shapes: list[tuple[int, int]] = []

    def expect(self, rows: Sequence[int], columns: int) -> None:
        """What sizes vLLM has for the members' outputs, and for their input."""
        self._shapes = [(n, columns) for n in rows]

    def take(self, member: int, key: str, tensor: torch.Tensor) -> None:
        """Keep what the bundle has under the name `key` of a member: a view of its file, until all is loaded."""
        if key != "weight":  # which is empty: it keeps those away who do not know the bundle
            self._layers.tensors[f"{self.members[member]}.{key}"] = tensor.detach()

    def loaded(self) -> None:
        """Raises BundleError if the sizes of the bundle's factors are others than vLLM's."""
        tensors = self._layers.tensors
        for name, shape in zip(self.members, self._shapes, strict=True):
            if (a := tensors.get(f"{name}.factor_a")) is None or (b := tensors.get(f"{name}.factor_b")) is None:
                raise BundleError(f"the bundle lacks a factor of {name}.")
            if (len(a), b.shape[1]) != shape:
                raise BundleError(f"{name} is {(len(a), b.shape[1])} in the bundle, and {shape} in vLLM's model.")
        self._layers.loaded()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs for x, in its type and on its device. Waits for an edge if there is none."""
        if self._layers.is_dummy():
            return x.new_zeros(*x.shape[:-1], sum(n for n, _ in self._shapes))
        edges = self._layers.edges
        if edges is None:
            raise BundleError("a protected layer is used before the model is loaded.")
        rows = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32).contiguous().numpy()
        parts = [edges.run(lambda group=group: _stacked(group, rows)) for group in self.groups]  # type: ignore[misc]
        y = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        return y.reshape(*x.shape[:-1], y.shape[1]).to(x.device, x.dtype)


def _stacked(group: ProtectedGroup, x: Rows) -> Rows:
    """The outputs of a group. Rows that are not finite give such rows, as in any other layer: they are one request's,
    and all the others' are in the same batch."""
    try:
        return group.stacked(x)
    except NumericsError:
        good = np.isfinite(x).all(axis=1)
        if good.all():
            raise
        some = group.stacked(np.ascontiguousarray(x[good]))
        y = np.full((len(x), some.shape[1]), np.nan, np.float32)
        y[good] = some
        return y
