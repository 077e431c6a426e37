"""Layers whose outputs are added up: one round trip where the model adds them, and right results whatever it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import exchanges
from torch import nn
from zoo import RANK, relative_error

import sliplm
from sliplm.errors import NumericsError
from sliplm.split.groups import Sum, find_groups
from sliplm.trusted.sums import Promise


class Parallel(nn.Module):
    """A parallel block: `how` combines the residual, attention's end and the MLP's."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.norm, self.how = nn.LayerNorm(32), how
        self.value, self.up = nn.Linear(32, 40), nn.Linear(32, 70)
        self.out, self.down = nn.Linear(40, 32), nn.Linear(70, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        a = nn.functional.dropout(self.out(torch.tanh(self.value(h))), 0.1, self.training)
        return self.norm(self.how(x, a, self.down(torch.relu(self.up(h)))))


def in_place(x: torch.Tensor, a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    m += a
    return m + x


WAYS = {
    "attention first": (lambda x, a, m: a + m + x, 2),
    "MLP first": (lambda x, a, m: m + a + x, 2),
    "residual first": (lambda x, a, m: x + a + m, 2),
    "residual with each": (lambda x, a, m: (a + x) + (m + x), 2),
    "in place": (in_place, 3),
    "weighted": (lambda x, a, m: torch.add(a, m, alpha=0.5) + x, 3),
    "scaled": (lambda x, a, m: 2 * a + m + x, 3),
    "one norm each": (lambda x, a, m: nn.functional.layer_norm(a, (32,)) + m + x, 3),
    "one of them twice": (lambda x, a, m: a + m + x * a.mean(), 3),
    "broken up": (lambda x, a, m: torch.cat([a, m], -1)[..., :32] + x, 3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_and_round_trips(way: str, mode: Any) -> None:
    how, trips = WAYS[way]
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32)
    module = Parallel(how).eval()
    with mode():
        want = module(x)
        got, groups = exchanges(sliplm.protect(module, x, rank=RANK), x)
    assert type(got) is torch.Tensor and relative_error(want, got) < 1e-3
    assert len(groups) == trips


def parallel() -> tuple[Parallel, Parallel, torch.Tensor]:
    torch.manual_seed(0)
    original = Parallel(WAYS["residual first"][0]).eval()
    protected = Parallel(original.how).eval()
    protected.load_state_dict(original.state_dict())
    x = torch.randn(4, 32)
    assert sum(isinstance(g, Sum) for g in find_groups(protected, x, RANK)) == 1
    return original, sliplm.protect(protected, x, rank=RANK), x


@torch.no_grad()
def test_a_promise_can_be_looked_at() -> None:
    original, protected, _ = parallel()
    x = torch.randn(4, 40)
    promise = protected.out(x)
    want = original.out(x)
    assert isinstance(promise, Promise) and promise.shape == want.shape and promise.dtype == want.dtype
    for look in (
        lambda t: t.clone(),
        lambda t: t.view(2, -1),
        lambda t: t[1:, :3],
        lambda t: t.double(),
        lambda t: t * 2,
        lambda t: torch.stack([t, t]),
        lambda t: t + 1,
        lambda t: 1 + t,
        lambda t: t @ t.T,
        lambda t: t + torch.ones(32),
        lambda t: t + t,
        lambda t: nn.functional.gelu(t),
    ):
        assert torch.allclose(look(promise), look(want), atol=1e-2)
        assert torch.allclose(look(protected.out(x)), look(want), atol=1e-2)
    assert "tensor(" in repr(promise) and float(protected.out(x).sum()) == pytest.approx(float(want.sum()), abs=1e-1)


@torch.no_grad()
def test_promises_of_other_calls_do_not_mix() -> None:
    original, protected, _ = parallel()
    a, b, h = torch.randn(4, 40), torch.randn(4, 40), torch.randn(4, 70)
    first, second, third = protected.out(a), protected.out(b), protected.down(h)
    a.zero_()  # what was promised was promised for the input as it was
    want = original.out(b) + original.down(h)
    assert torch.allclose(second + third, want, atol=1e-2)
    assert torch.allclose(third + first, original.down(h) + first.redeem(), atol=1e-2)
    assert not torch.allclose(first * 1, original.out(a), atol=1e-2)
    rest = torch.randn(4, 32)
    total, wanted = protected.out(b) + rest, original.out(b) + rest
    rest.zero_()
    assert torch.allclose(total.clone() * 1, wanted, atol=1e-2)
    fresh = protected.out(b)
    total = fresh + protected.out(b)  # the same half twice
    assert torch.allclose(total + 0, 2 * original.out(b), atol=1e-2)
    bad = protected.out(torch.full((1, 40), torch.nan))
    with pytest.raises(NumericsError, match="the input of out "):
        bad.clone() * 1
