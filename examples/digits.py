"""Two small classifiers, protected: what they answer, and what a thief of the edge's part would have.

`python examples/digits.py` trains a CNN and an MLP on scikit-learn's handwritten digits (8 x 8 pixels), protects each
with `sliplm.protect`, and prints the accuracy of the original, of the protected model, and of the edge's part alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import sliplm
from sliplm.attacks.stolen import guess_scales
from sliplm.split.blinding import stored, unblind
from sliplm.split.camouflage import trusted_rank
from sliplm.split.groups import blocks, find_groups
from sliplm.split.matrices import make_plan, split_group
from sliplm.split.plan import Options
from sliplm.split.planes import dequantise

OPTIONS = Options()
TEST = 597  # of 1,797 digits


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "MLP": mlp}


@dataclass(frozen=True)
class Digits:
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor

    def accuracy(self, model: nn.Module) -> float:
        """In percent, of the digits that were not trained on."""
        return 100 * float((predictions(model, self) == self.labels).double().mean())


def digits(seed: int) -> Digits:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST], order[TEST:]
    return Digits(images[train], labels[train], images[test], labels[test])


def trained(make: Callable[[], nn.Module], data: Digits, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(data.train[batch]), data.train_labels[batch]).backward()
            optimiser.step()
    return model.eval()


@torch.no_grad()
def predictions(model: nn.Module, data: Digits) -> torch.Tensor:
    return model(data.test).argmax(1)


class Weights:
    """A model's weights, as a split reads them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.model.get_parameter(name).shape)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        return self.model.get_parameter(name).detach().chunk(parts)[part]


@torch.no_grad()
def stolen(model: nn.Module, fresh: nn.Module, inputs: torch.Tensor, best: bool) -> nn.Module:
    """The classifier that a thief makes of the edge's part of `model`, which is split as `protect` splits it.

    With `best` he is given all that the edge lacks, but for the low-rank part: scales, blinding secrets, biases, and
    the layers that stay on the trusted side. Without, he has the integers as they lie on the edge and the architecture:
    he guesses one scale a row, and takes the rest from `fresh`, an untrained model.
    """
    thief = copy.deepcopy(model if best else fresh)
    groups = find_groups(model, inputs, OPTIONS.rank)
    for number, (group, plan) in enumerate(zip(groups, make_plan(groups, OPTIONS), strict=True)):
        names = {name: name for m in group for name in (m.weight, m.bias) if name}
        secret = dict(split_group(Weights(model), number, group, plan, names, OPTIONS))
        q, leader = secret["q"], group[0].name
        if best:
            weight = unblind(dequantise(q, secret[f"{leader}.scales"]), *stored(secret.__getitem__, leader))
        else:
            size = float(fresh.get_parameter(group[0].weight).square().mean().sqrt())
            weight = dequantise(q, guess_scales(q, plan.planes, size))
        for m, rows, columns in blocks(group):
            whole = thief.get_parameter(m.weight)
            whole.view(m.parts, -1)[m.part] = weight[rows, columns].reshape(-1)
    return thief


@torch.no_grad()
def trusted_share(model: nn.Module, inputs: torch.Tensor) -> float:
    """What the trusted side does itself of a prediction's multiply-adds, in percent. Pads come on top, beforehand."""
    rows: dict[str, int] = {}  # of inputs that each weight is multiplied with

    def watch(name: str) -> Callable[..., None]:
        return lambda layer, _, out: rows.update({f"{name}.weight": out[0].numel() // len(layer.weight)})

    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "weight")]
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers]
    model(inputs)
    for hook in hooks:
        hook.remove()
    whole = {name: count * model.get_parameter(name).numel() for name, count in rows.items()}
    own = dict(whole)  # what is not protected stays there as it is
    for m in itertools.chain.from_iterable(find_groups(model, inputs, OPTIONS.rank)):
        own[m.weight] = (
            rows[m.weight] * trusted_rank(OPTIONS.rank, m.rows, m.columns, OPTIONS.camouflage) * (m.rows + m.columns)
        )
    return 100 * sum(own.values()) / sum(whole.values())


@dataclass(frozen=True)
class Result:
    """In percent, but for `differ`: predictions in which the protected model and the original differ."""

    original: float
    protected: float
    differ: int
    share: float
    best: list[float]
    lying: list[float]


def measure(name: str, seed: int, epochs: int, splits: int) -> Result:
    """Train, protect, and steal `splits` times: every split draws new secrets."""
    data, make = digits(seed), MODELS[name]
    model = trained(make, data, seed, epochs)
    want, original = predictions(model, data), data.accuracy(model)
    thieves: dict[bool, list[float]] = {True: [], False: []}
    for number in range(splits):
        torch.manual_seed(1000 + number)
        fresh = make().eval()
        for best, found in thieves.items():
            found.append(data.accuracy(stolen(model, fresh, data.test[:1], best)))
    share = trusted_share(model, data.test[:1])
    protected = sliplm.protect(model, data.test[:1], rank=OPTIONS.rank)
    differ = int((predictions(protected, data) != want).sum())
    return Result(original, data.accuracy(protected), differ, share, thieves[True], thieves[False])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="data splits and trainings of each model")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--splits", type=int, default=5, help="thefts of each model")
    asked = parser.parse_args()
    heads = ("model", "original", "protected", "predictions that differ", "edge part, best case", "as it lies there")
    print("|", " | ".join([*heads, "trusted side's share"]), "|")
    print("|---" * (len(heads) + 1) + "|")
    for name in MODELS:
        runs = [measure(name, seed, asked.epochs, asked.splits) for seed in range(asked.seeds)]
        original, protected = (statistics.mean(getattr(r, side) for r in runs) for side in ("original", "protected"))
        cells = [f"{original:.2f} %", f"{protected:.2f} %", f"{sum(r.differ for r in runs)} of {TEST * len(runs)}"]
        for side in ("best", "lying"):
            found = [accuracy for r in runs for accuracy in getattr(r, side)]
            cells.append(f"{statistics.mean(found):.1f} % ({min(found):.1f} to {max(found):.1f})")
        cells.append(f"{runs[0].share:.0f} %")
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
