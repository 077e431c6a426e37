"""A split whose plan has open or trusted blocks: what belongs where, and what the edge gets in plain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch

from sliplm.bundle import CONFIG_FILE, OPEN_FILE, OpenManifest, sha256_file
from sliplm.errors import SlipError, UnsupportedModelError
from sliplm.open.blocks import block_of, find_blocks
from sliplm.split import writer
from sliplm.split.groups import Group
from sliplm.split.places import Place
from sliplm.split.plan import GroupPlan, OpenPlan, gives_away
from sliplm.split.source import Source
from sliplm.split.tensors import Layout


@dataclass(frozen=True)
class Placed:
    """Where the parts of a model are: the `path` of its list of blocks, and the place of each. All that is in no block
    (embedding, last norm, head) is whole on the trusted side."""

    path: str
    places: Sequence[Place]

    @property
    def open(self) -> OpenPlan | None:
        """The runs of open blocks; None if there are none."""
        runs = []
        for place, found in groupby(range(len(self.places)), self.places.__getitem__):
            numbers = list(found)
            if place == "open":
                runs.append((numbers[0], numbers[-1]))
        return OpenPlan(self.path, tuple(runs)) if runs else None

    def of(self, name: str) -> Place:
        """The place of a module or a tensor."""
        number = block_of(name, self.path)
        return "trusted" if number is None else self.places[number]


def place(skeleton: Any, wanted: Sequence[Place], path: str) -> Placed:
    """Raises UnsupportedModelError if an open block shares a tensor with what is elsewhere."""
    placed = Placed(path, wanted)
    for pair in getattr(skeleton, "all_tied_weights_keys", {}).items():
        if len({placed.of(name) for name in pair}) > 1:
            raise UnsupportedModelError(f"{pair[0]} and {pair[1]} are one tensor, so both have to be in one place.")
    return placed


def count_blocks(skeleton: Any) -> tuple[str, int]:
    """The name of the list of decoder blocks, and how many there are. Raises UnsupportedModelError."""
    path = find_blocks(skeleton)
    return path, len(skeleton.get_submodule(path))


def place_groups(plan: Sequence[GroupPlan], placed: Placed) -> list[GroupPlan]:
    """`plan` with the place of every group. Raises UnsupportedModelError: a group's matrices are in several. SlipError:
    all are on the trusted side."""
    found = []
    for group in plan:
        places = {placed.of(name) for name in group.members}
        if len(places) > 1:
            raise UnsupportedModelError(f"{group.members[0]} and {group.members[-1]} have to be in one place.")
        found.append(msgspec.structs.replace(group, place=places.pop()))
    if all(group.place == "trusted" for group in found):
        raise SlipError("with this plan the trusted side has the whole model, and the edge nothing to do.")
    return found


def masked_groups(groups: Sequence[Group], plan: Sequence[GroupPlan]) -> list[Group]:
    """Those of `groups` that `plan` masks."""
    return [group for group, of in zip(groups, plan, strict=True) if of.place == "masked"]


def take_open(plain: Layout, placed: Placed | None) -> tuple[Layout, Layout]:
    """`plain` in two: what the trusted side keeps, and what is open."""
    is_open = {name: placed is not None and placed.of(name) == "open" for name in plain}
    return tuple({n: e for n, e in plain.items() if is_open[n] is side} for side in (False, True))  # type: ignore[return-value]


def write_open(
    edge: Path, source: Source, open_plan: OpenPlan, tensors: Layout, stored: dict[str, str], kind: str
) -> OpenManifest:
    """Write the open blocks' `tensors`, in the types that `source` has them in, and the configuration from which
    Transformers makes the model, of the class `kind`, into DIR/edge; what its manifest says of them."""
    layout: Layout = {name: (source.dtype(stored[name]), shape) for name, (_, shape) in tensors.items()}
    file = writer.TensorWriter(edge / OPEN_FILE, layout)
    try:
        for name in layout:
            file.write(name, source.read(stored[name]))
        weights = file.close()
    finally:
        file.abort()
    config = copy.deepcopy(source.config)
    config.dtype, config.architectures = torch.float32, [kind]
    writer.write_json(edge / CONFIG_FILE, config.to_diff_dict())
    runs = list(open_plan.runs)
    return OpenManifest(open_plan.path, runs, weights, sha256_file(edge / CONFIG_FILE), gives_away(runs))
