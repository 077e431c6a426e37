"""Two layers whose outputs are only ever added up, as the ends of a parallel attention-MLP block: one round trip.

Their matrices lie side by side on the edge, [W_1 | W_2], so that one exchange gives W_1 x_1 + W_2 x_2. When the model
calls the first layer, the second's input does not exist yet, so what it gets is a promise. Adding the other promise
redeems both at once. Whatever else is done to a promise, it is evaluated then and there, by an exchange of its own: the
results are right in any case.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_map

from sliplm.errors import NumericsError
from sliplm.exchange.operator import Operator
from sliplm.trusted.group import MemberWeights
from sliplm.trusted.runtime import Runtime


class SumGroup:
    """Protected linear maps of different inputs and one output size N, bound to a runtime.

    Args: as for `ProtectedGroup`, with the members' columns side by side in Q.
    """

    def __init__(self, op: Operator, members: list[MemberWeights], runtime: Runtime) -> None:
        self._op = op
        self.members = members
        self._runtime = runtime

    def __repr__(self) -> str:
        return f"SumGroup({self._op.number}, members={[m.name for m in self.members]})"

    def forward(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """A promise of the output (..., N) of `member` for the input x (..., K), in x's dtype and on its device."""
        return Promise(self, {member: x.detach().clone()}, None)

    def evaluate(self, inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        """The sum (..., N) of the members' outputs for `inputs`; members without an input add nothing."""
        like = next(iter(inputs.values()))
        count = like.shape[:-1].numel()
        parts = [
            inputs[i].reshape(count, -1).to("cpu", torch.float32) if i in inputs else torch.zeros(count, m.b.shape[1])
            for i, m in enumerate(self.members)
        ]
        x = torch.cat(parts, dim=1).numpy()
        try:
            y = self._runtime.product(self._op, x, partial(self._own, inputs.keys()))
        except NumericsError as error:
            name = self.members[min(inputs)].name
            raise NumericsError(f"the input of {name} cannot be protected: {error}.") from None
        return torch.from_numpy(y).reshape(*like.shape[:-1], -1).to(like.device, like.dtype)

    def _own(self, given: Collection[int], x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sum of A (B x) + b over the members that were `given` an input, for their columns of x side by side."""
        y = torch.zeros(len(x), self.members[0].a.shape[0])
        parts = torch.from_numpy(x).split([m.b.shape[1] for m in self.members], dim=1)
        for i, (m, part) in enumerate(zip(self.members, parts, strict=True)):
            if i in given:
                y += (part @ m.b.T) @ m.a.T
                if m.bias is not None:
                    y += m.bias
        return y.numpy()


class Promise(torch.Tensor):
    """The sum of some members' outputs, not yet asked for, and of ordinary tensors that were added meanwhile."""

    _group: SumGroup
    _inputs: dict[int, torch.Tensor]
    _rest: torch.Tensor | None
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, group: SumGroup, inputs: dict[int, torch.Tensor], rest: torch.Tensor | None) -> Promise:
        like = next(iter(inputs.values()))
        shape = (*like.shape[:-1], group.members[0].a.shape[0])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        self._group, self._inputs, self._rest, self._value = group, inputs, rest, None
        return self  # type: ignore[no-any-return]

    def __init__(self, *_: Any) -> None:
        """Everything is done by `__new__`, as tensors want it."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.redeem())

    def redeem(self) -> torch.Tensor:
        """The value; exchanged once, at the first call."""
        if self._value is None:
            value = self._group.evaluate(self._inputs)
            self._value = value if self._rest is None else value + self._rest
        return self._value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.add.Tensor and not kwargs and (joined := _join(*args)) is not None:
            return joined
        if func is torch.ops.aten.clone.default and args[0]._value is None:
            return Promise(args[0]._group, args[0]._inputs, args[0]._rest)
        # Inference mode brings operations whole, such as a dropout that only copies: look at what they consist of.
        out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        args, kwargs = tree_map(_redeemed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _redeemed(x: Any) -> Any:
    return x.redeem() if isinstance(x, Promise) else x


def _join(a: Any, b: Any) -> torch.Tensor | None:
    """a + b without an exchange, or by one that redeems both; None if it takes more than that."""
    if not isinstance(a, Promise):
        a, b = b, a
    if a._value is not None or not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return None
    if not isinstance(b, Promise):
        return Promise(a._group, a._inputs, b.clone() if a._rest is None else a._rest + b)  # b may change in place
    if b._value is not None or a._group is not b._group or a._inputs.keys() & b._inputs.keys():
        return None
    rests = [rest for rest in (a._rest, b._rest) if rest is not None]
    both = Promise(a._group, a._inputs | b._inputs, sum(rests[1:], rests[0]) if rests else None)
    return both.redeem() if len(both._inputs) == len(a._group.members) else both
