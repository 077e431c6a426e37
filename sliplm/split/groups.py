"""Which layers are protected, and which of their matrices read the same input (q, k, v; gate, up): one group, one
round trip."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sliplm.errors import UnsupportedModelError
from sliplm.split.example import example_inputs
from sliplm.split.layers import MAX_COLUMNS, Member, is_experts, is_linear, join, members
from sliplm.split.sums import SumWatch

logger = logging.getLogger(__name__)
Group = tuple[Member, ...]
"""Matrices that share an exchange: they read the same input, and are stacked; or they are a `Sum`."""


class Sum(tuple[Member, ...]):
    """Matrices of different inputs, side by side: their outputs are only ever added up."""

    __slots__ = ()


Layers = dict[str, tuple[Member, ...]]  # by the name of the layer

MAX_UNKNOWN = 0.1  # share of the protected weights that unknown layers may hold


def find_groups(model: nn.Module, inputs: Any = None, rank: int = 0) -> list[Group]:
    """Group the matrices of `model` by the tensor they read, which one forward pass shows (under fake tensors it costs
    no arithmetic).

    Grouping decides about round trips only, never about results. Where the pass fails, every matrix is a group.

    Args:
        inputs: of the forward pass: a dictionary of keyword arguments, a tuple of positional ones, or one tensor; by
            default made from the model's configuration.
        rank: layers with a matrix of at most this rank stay on the trusted side, as nothing would be left for the edge.

    Returns:
        Groups in order of execution. Matrices that the pass does not reach come last, each alone.

    Raises:
        UnsupportedModelError: naming the modules that cannot be protected.
    """
    layers = find_layers(model, rank)
    _refuse_unknown(model, layers, rank)
    calls: dict[Hashable, list[str]] = {}
    sums = SumWatch()
    try:
        with torch.inference_mode(False), torch.no_grad(), _watched(model, layers, calls, sums), sums:
            _call(model, example_inputs(model) if inputs is None else inputs)
    except Exception as error:  # whatever the model's code raises
        reason = str(error).strip().splitlines()
        logger.warning("no round trips are saved: a trial run failed (%s)", reason[0] if reason else repr(error))
        calls, sums = {}, SumWatch()
    groups = _arrange({m.name: m for found in layers.values() for m in found}, calls)
    return _pair(groups, sums.pairs)


def size(group: Group) -> tuple[int, int]:
    """Rows and columns of a group's matrix, before it is cut into planes."""
    rows, columns = ([getattr(m, side) for m in group] for side in ("rows", "columns"))
    return (rows[0], sum(columns)) if isinstance(group, Sum) else (sum(rows), columns[0])


def blocks(group: Group) -> Iterator[tuple[Member, slice, slice]]:
    """Each member, and which rows and columns of the group's matrix are its own."""
    row = column = 0
    for m in group:
        yield m, slice(row, row + m.rows), slice(column, column + m.columns)
        if isinstance(group, Sum):
            column += m.columns
        else:
            row += m.rows


def find_layers(model: nn.Module, rank: int = 0) -> Layers:
    """The layers of `model` that are protected at this rank."""
    return {name: found for name, found in _supported(model).items() if not _too_small(found, rank)}


def left_out(model: nn.Module, groups: list[Group]) -> list[str]:
    """Layers that hold matrices and stay on the trusted side all the same, embedding tables apart."""
    protected = protected_tensors(groups)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        and any(p.dim() >= 2 and join(name, key) not in protected for key, p in _parameters(module))
    ]


def protected_tensors(groups: list[Group]) -> set[str]:
    """Names of the original's tensors that the protected model does not have."""
    return {name for group in groups for m in group for name in (m.weight, m.bias) if name}


def _supported(model: nn.Module) -> Layers:
    return {name: found for name, module in model.named_modules() if (found := members(name, module))}


def _too_small(found: tuple[Member, ...], rank: int) -> bool:
    return any(min(m.rows, m.columns) <= rank for m in found)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False)


def _refuse_unknown(model: nn.Module, layers: Layers, rank: int) -> None:
    """Layers of kinds that we do not know are right where they are, on the trusted side: position tables, routers. But
    the trusted side is to do little, so a model whose weights are mostly in such layers is not protected at all."""
    supported = _supported(model)
    unknown = {
        f"{name} ({type(module).__name__})": size
        for name, module in model.named_modules()
        if name not in supported
        and not isinstance(module, nn.Embedding)
        and (size := sum(p.numel() for _, p in _parameters(module) if p.dim() >= 2))
    }
    known = sum(m.rows * m.columns for found in supported.values() for m in found)
    if sum(unknown.values()) > MAX_UNKNOWN * known:
        names = sorted(unknown, key=lambda name: -unknown[name])
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise UnsupportedModelError(f"layers of an unsupported type hold weights: {shown}.")
    if not layers:
        why = f" at rank {rank}: its matrices are no larger" if supported else ""
        raise UnsupportedModelError(f"{type(model).__name__} has no layer to protect{why}.")


@contextmanager
def _watched(model: nn.Module, layers: Layers, calls: dict[Hashable, list[str]], sums: SumWatch) -> Iterator[None]:
    """Note in `calls` which matrices are called on what: a tensor's place in memory, or a key of their own; and mark
    the outputs of linear layers in `sums`."""
    alive: list[torch.Tensor] = []  # a freed storage's address would be reused, and two inputs taken for one

    def hook(names: list[str], alone: bool) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if alone:
                for name in names:
                    calls[name] = [name]
                return
            x = args[0] if args else kwargs["input"]
            alive.append(x)
            place = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), _version(x))
            calls.setdefault(place, []).extend(names)

        return before

    hooks, stubbed = [], []
    for name, found in layers.items():
        module = model.get_submodule(name)
        before = hook([m.name for m in found], alone=not is_linear(module))
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if is_linear(module):
            mark = partial(sums.mark, found[0].name)
            hooks.append(module.register_forward_hook(lambda _module, _args, out, mark=mark: mark(out)))
        if is_experts(module):  # where it sends tokens depends on their values, which fake tensors do not have
            module.forward = _like_first
            stubbed.append(module)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for module in stubbed:
            del module.forward


def _version(x: torch.Tensor) -> int:
    """How often x was changed in place; tensors made in inference mode, the caller's inputs, do not count that."""
    return 0 if x.is_inference() else x._version


def _like_first(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(x)


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, dict):
        model(**inputs)
    elif isinstance(inputs, tuple):
        model(*inputs)
    else:
        model(inputs)


def _arrange(known: dict[str, Member], calls: dict[Hashable, list[str]]) -> list[Group]:
    together: dict[str, set[frozenset[str]]] = {}
    for names in calls.values():
        for name in names:
            together.setdefault(name, set()).add(frozenset(names))
    position = {name: i for i, name in enumerate(known)}
    groups: list[Group] = []
    done: set[str] = set()
    for name in [*(n for names in calls.values() for n in names), *known]:
        if name in done:
            continue
        # A matrix called with different company at different times is a group of its own.
        sets = together.get(name, {frozenset([name])})
        steady = len(sets) == 1 and all(together[other] == sets for other in next(iter(sets)) if other in together)
        names = sorted(next(iter(sets)), key=position.__getitem__) if steady else [name]
        groups.append(tuple(known[n] for n in names))
        done.update(names)
    return groups


def _pair(groups: list[Group], pairs: list[tuple[str, str]]) -> list[Group]:
    """Make those groups of one that form `pairs` one sum, in the place of the later."""
    place = {group[0].name: i for i, group in enumerate(groups) if len(group) == 1}
    paired = list(groups)
    for names in pairs:
        if not all(name in place for name in names):
            continue
        first, second = sorted(place[name] for name in names)
        both = Sum((*groups[first], *groups[second]))
        if both[0].rows == both[1].rows and size(both)[1] <= MAX_COLUMNS:
            paired[first], paired[second] = (), both
    return [group for group in paired if group]
