"""What a copied edge bundle is worth in the thief's best case.

The thief is given everything but the low-rank part: the architecture, embeddings, norms, biases, the scales of every
plane and the blinding secrets, all read from the trusted bundle. A real thief has only Q.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from sliplm import bundle
from sliplm.split.blinding import Rotation
from sliplm.split.groups import as_member
from sliplm.split.planes import dequantise


def edge_only(directory: Path) -> Any:
    """The original architecture with W_edge in place of every protected W; float32. Raises BundleError."""
    trusted = directory / "trusted"
    edge = bundle.EdgeBundle.open(directory / "edge")
    bundle.open_trusted(trusted)
    config = transformers.AutoConfig.from_pretrained(trusted)
    settings = config.quantization_config
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])._from_config(config)
    model.tie_weights()
    with safe_open(trusted / "model.safetensors", "pt") as file:
        names = set(file.keys())
        state = {name: file.get_tensor(name) for name in model.state_dict() if name in names}
        missing, _ = model.load_state_dict(state, strict=False)
        for number, group in enumerate(settings["groups"]):
            members = [as_member(name, model.get_submodule(name)) for name in group]
            weight = _edge_weight(torch.from_numpy(edge.matrix(number).copy()), file, group[0])
            for m, part in zip(members, weight.split([m.rows for m in members]), strict=True):
                module = model.get_submodule(m.name)
                # A tied head gets a matrix of its own: the embedding stays what it was.
                module.weight = torch.nn.Parameter((part.T if m.transposed else part).contiguous())
    return model.eval()


def _edge_weight(q: torch.Tensor, file: Any, leader: str) -> torch.Tensor:
    """W_edge in the original basis, float32 (sum N, K)."""
    weight = dequantise(q, file.get_tensor(f"{leader}.scales"))
    if f"{leader}.in_perm" not in file.keys():  # noqa: SIM118 - not a dict
        return weight
    inner, outer = (
        Rotation(file.get_tensor(f"{leader}.{side}_perm").numpy(), file.get_tensor(f"{leader}.{side}_sign").numpy())
        for side in ("in", "out")
    )
    return outer.invert(inner.invert(weight).T).T
