"""One group of matrices, split: what the trusted bundle stores of it, and Q."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from sliplm.errors import UnsupportedModelError
from sliplm.exchange import check
from sliplm.exchange.operator import Operator
from sliplm.split.again import FirstSplit
from sliplm.split.base import FineTuned, divide, divide_anywhere
from sliplm.split.blinding import Blinding, blind
from sliplm.split.camouflage import trusted_rank
from sliplm.split.groups import Group, Sum, blocks, size
from sliplm.split.plan import GroupPlan, Options
from sliplm.split.planes import quantise
from sliplm.split.tensors import Layout


class TensorSource(Protocol):
    """Where weights come from; see `Source`."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor: ...


def guard(groups: list[Group], plan: list[GroupPlan]) -> str:
    """The name under which a bundle holds an empty tensor, where the original has a weight that is not whole there.

    Without sliplm, Transformers would skip the unknown quantization with a warning, and run on random numbers. A tensor
    of the wrong shape makes it fail.
    """
    return next(group[0].weight for group, of in zip(groups, plan, strict=True) if of.place != "trusted")


def make_plan(groups: list[Group], options: Options) -> list[GroupPlan]:
    """What `options` say of every group alike."""
    return [
        GroupPlan(
            tuple(m.name for m in group), "sum" if isinstance(group, Sum) else "stack", options.rank, options.planes
        )
        for group in groups
    ]


def factor_dtype(name: str, options: Options, first: FirstSplit | None) -> torch.dtype:
    """In which the factors of the matrix `name` are stored: bfloat16 where they are `camouflage.rounded` to it, and as
    the `first` split has them where they are taken from there."""
    if first:
        return first.dtype(name)
    rounded = not options.leading or (options.camouflage and options.base is None)
    return torch.bfloat16 if rounded else torch.float32


def group_layout(group: Group, plan: GroupPlan, options: Options, first: FirstSplit | None = None) -> Layout:
    """The trusted tensors of a group, in file order: factors and bias of each member; at its first, the operator."""
    layout: Layout = {}
    for m in group:
        rank = trusted_rank(plan.rank, m.rows, m.columns, options.camouflage)
        dtype = factor_dtype(m.name, options, first)
        layout[f"{m.name}.factor_a"] = (dtype, (m.rows, rank))
        layout[f"{m.name}.factor_b"] = (dtype, (rank, m.columns))
        if m.bias:
            layout[f"{m.name}.bias"] = (torch.float32, (m.rows,))
    shared = Operator.layout(plan.planes, *size(group), options.blinding)
    return layout | {f"{group[0].name}.{name}": entry for name, entry in shared.items()}


def split_group(
    source: TensorSource,
    number: int,
    group: Group,
    plan: GroupPlan,
    stored: dict[str, str],
    options: Options,
    first: FirstSplit | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The trusted tensors of group `number` in the order of `group_layout`, and "q", int8 (planes * N, K); `stored`
    says what `source` calls the original's.

    first: an earlier split, in which the group has the same number and whose factors are used again.
    """
    generator = torch.Generator().manual_seed(0)  # for the sketch of the SVD, which is no secret
    rest = torch.empty(size(group))
    for m, rows, columns in blocks(group):
        where = stored[m.weight]
        check_shape(m.weight, source.shape(where), m.shape)
        weight = m.matrix(source.read(where, m.part, m.parts).float())
        public, eps = None, 0.0
        if isinstance(source, FineTuned):
            base = source.public(where, m.part, m.parts)
            public = None if base is None else m.matrix(base.float())
            eps = torch.finfo(source.dtype(where)).eps
        factors = first.factors(m.name) if first else None
        a, b, rest[rows, columns] = (
            divide(weight, plan.rank, options.camouflage, generator, public, eps, factors)
            if options.leading
            else divide_anywhere(weight, trusted_rank(plan.rank, m.rows, m.columns, options.camouflage))
        )
        dtype = factor_dtype(m.name, options, first)
        yield f"{m.name}.factor_a", _exactly(a, dtype)
        yield f"{m.name}.factor_b", _exactly(b, dtype)
        if m.bias:
            yield f"{m.name}.bias", source.read(stored[m.bias], m.part, m.parts).float().reshape(m.rows)
        del weight, public
    if first:
        first.check_length(number, group[0].name, rest)
    # One of inputs and one of outputs for the whole group: see `split.blinding`.
    inner, outer = (Blinding.random(n) if options.blinding else None for n in reversed(rest.shape))
    if inner is not None and outer is not None:
        rest = blind(rest, inner, outer)
    q, scales = quantise(rest, plan.planes)
    del rest
    secrets = check.secrets(q.numpy())
    op = Operator(number, (len(q), q.shape[1]), row_norm(q), scales.numpy(), inner, outer, *secrets)
    yield from ((f"{group[0].name}.{name}", tensor) for name, tensor in op.tensors().items())
    yield "q", q


def _exactly(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`factor` in another type. Raises RuntimeError if that changes it: the edge's part was made for the factor as it
    is, and the two would be a slightly different model's."""
    stored = factor.to(dtype)
    if not torch.equal(stored.to(factor.dtype), factor):
        raise RuntimeError(f"a factor would be changed by storing it as {dtype}")
    return stored


def row_norm(q: torch.Tensor) -> float:
    """The largest Euclidean norm of a row of int8 `q`, rounded up to float32; at least 1."""
    largest = max(float(block.double().square().sum(1).max()) for block in q.split(4096))
    return float(np.nextafter(np.float32(max(largest, 1.0) ** 0.5), np.float32(np.inf)))


def check_shape(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UnsupportedModelError if a tensor has another shape than its model."""
    if actual != expected:
        raise UnsupportedModelError(f"{name} has shape {actual}, its configuration says {expected}.")
