"""What the thief starts from: the edge's integers, made into a model as well as the given oracles allow.

Every thief knows the architecture, the tokenizer, and which group of Q belongs to which layer; shapes give most of
that away. What a real thief lacks beyond that are the oracles below, read from the trusted bundle to measure what
each is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from sliplm import bundle
from sliplm.split.blinding import stored, unblind
from sliplm.split.groups import Group, blocks, protected_tensors
from sliplm.split.plan import masked, read_plan
from sliplm.split.planes import dequantise
from sliplm.trusted.transformers import SlipConfig


@dataclass(frozen=True)
class Oracles:
    """What the thief is given beyond the edge bundle.

    Attributes:
        scales: of every plane and row. blinding: the secret rotations. plain: every tensor that is not protected
            (embeddings, norms), and biases.
    """

    scales: bool = False
    blinding: bool = False
    plain: bool = False

    def __str__(self) -> str:
        given = [f.name for f in fields(self) if getattr(self, f.name)]
        return "none" if not given else "all" if len(given) == len(fields(self)) else "+".join(given)


NONE = Oracles()
ALL = Oracles(scales=True, blinding=True, plain=True)


class Stolen:
    """An edge bundle in the thief's hands. `directory` also holds the trusted half, read by oracles and scores only.

    Blocks that are open are the thief's, plain and whole; those on the trusted side have nothing on the edge, and no
    oracle gives them away.
    """

    def __init__(self, directory: Path) -> None:
        """Raises BundleError."""
        self.trusted = directory / "trusted"
        self.edge = bundle.EdgeBundle.open(directory / "edge")
        bundle.open_trusted(self.trusted)
        self.digest = self.edge.digest.hex()[:16]
        self.config = transformers.AutoConfig.from_pretrained(self.trusted)
        self.settings: dict[str, Any] = self.config.quantization_config
        plan = read_plan(self.settings)
        self.plan = masked(plan)
        self._withheld = tuple(f"{name}." for of in plan if of.place == "trusted" for name in of.members)
        del self.config.quantization_config

    def scratch(self, seed: int = 0) -> Any:
        """The same architecture, freshly initialised: a thief without any bundle."""
        torch.manual_seed(20407 + seed)  # the same for all thieves, so that they differ in what they know only
        return getattr(transformers, self.config.architectures[0])(self.config)

    def placebo(self, seed: int = 0) -> Any:
        """A model made as `model(NONE)` makes it, but from random integers: another thief without any bundle.

        It differs from `scratch` as the stolen one does, in equal rows and an untied head, which is worth something."""
        real, generator = self.edge, torch.Generator().manual_seed(20407 + seed)
        try:
            self.edge = _Noise(real, generator)  # type: ignore[assignment]
            return self.model(NONE, seed)
        finally:
            self.edge = real

    def model(self, oracles: Oracles, seed: int = 0) -> Any:
        """The architecture with the edge's part in place of every protected matrix, the rest fresh unless given."""
        model = self.scratch(seed)
        groups = self.groups(model)
        with safe_open(self.trusted / "model.safetensors", "pt") as file:
            if oracles.plain:
                known = {name for name in file.keys() if not name.startswith(self._withheld)}  # noqa: SIM118
                known -= protected_tensors(groups)
                state = {name: file.get_tensor(name) for name in model.state_dict() if name in known}
                model.load_state_dict({n: t for n, t in state.items() if t.numel()}, strict=False)  # one is a guard
            if self.edge.opened is not None:
                model.load_state_dict(load_file(self.edge.directory / bundle.OPEN_FILE), strict=False)
            found: dict[str, torch.Tensor] = {}
            for number, group in enumerate(groups):
                weight = self.matrix(number, group, oracles, file, fresh_size(model, group))
                for m, rows, columns in blocks(group):
                    part = weight[rows, columns]
                    whole = found.setdefault(m.weight, torch.empty(m.shape))
                    whole.view(m.parts, -1)[m.part] = (part.T if m.transposed else part).reshape(-1)
                    if m.bias and oracles.plain:
                        model.get_parameter(m.bias).data.view(m.parts, -1)[m.part] = file.get_tensor(f"{m.name}.bias")
        for name, whole in found.items():
            layer, _, key = name.rpartition(".")
            setattr(model.get_submodule(layer), key, torch.nn.Parameter(whole))
        if getattr(self.config, "tie_word_embeddings", False) and not oracles.plain:
            # A tied head is the embedding, so the head's edge part is the best guess for it.
            model.get_input_embeddings().weight.data.copy_(model.get_output_embeddings().weight.data)
        return model

    def groups(self, model: Any) -> list[Group]:
        found: list[Group] = SlipConfig.from_dict(self.settings).groups(model)
        return found

    def matrix(self, number: int, group: Group, oracles: Oracles, file: Any, size: float) -> torch.Tensor:
        """The thief's matrix of a group, float32, of shape `split.groups.size`; `size`: root mean square if unknown."""
        q = torch.from_numpy(self.edge.matrix(number).copy())
        leader = group[0].name
        if oracles.scales:
            weight = dequantise(q, file.get_tensor(f"{leader}.scales"))
        else:
            weight = dequantise(q, guess_scales(q, self.plan[number].planes, size))
        if oracles.blinding and self.settings["blinding"]:
            weight = unblind(weight, *stored(file.get_tensor, leader))
        return weight


class _Noise:
    """Random integers of the shapes of an edge bundle, spread like blinded ones."""

    def __init__(self, edge: bundle.EdgeBundle, generator: torch.Generator) -> None:
        self._edge, self._generator = edge, generator
        self.opened = None

    def matrix(self, group: int) -> Any:
        noise = torch.randn(self._edge.matrix(group).shape, generator=self._generator) * 32
        return noise.round_().clamp_(-127, 127).to(torch.int8).numpy()


def guess_scales(q: torch.Tensor, planes: int, size: float) -> torch.Tensor:
    """Scales (planes, N) of int8 `q` (planes * N, K) such that every row has root mean square `size`.

    The second plane holds what rounding left over, at most half a step of the first: its steps are 254 times smaller.
    """
    first = q[: len(q) // planes].float().square().mean(1).sqrt().clamp_min(1e-6)
    return torch.stack([size / first / 254**j for j in range(planes)])


def fresh_size(model: Any, group: Group) -> float:
    """The root mean square of a fresh weight of this group: all that a thief without scales has to go by."""
    return float(model.get_parameter(group[0].weight).detach().square().mean().sqrt())


def trim(model: Any, vocabulary: torch.Tensor) -> Any:
    """`model` with the rows `vocabulary` of its embedding and its head only; a tied head stays tied.

    A thief trains on the tokens that occur in its text. Where the head's rows are in a secret order, it takes as many.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[vocabulary])
    embedding.padding_idx = None
    head.weight = embedding.weight if tied else torch.nn.Parameter(head.weight.detach()[vocabulary])
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[vocabulary])
    embedding.num_embeddings = head.out_features = len(vocabulary)
    return model
