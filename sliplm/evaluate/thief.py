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
from sliplm.split.blinding import stored, unblind
from sliplm.split.groups import blocks, protected_tensors
from sliplm.split.planes import dequantise
from sliplm.trusted.transformers import SlipConfig


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
        groups = SlipConfig.from_dict(settings).groups(model)
        plain = set(file.keys()) - protected_tensors(groups)
        state = {name: file.get_tensor(name) for name in model.state_dict() if name in plain}
        model.load_state_dict(state, strict=False)
        stolen: dict[str, torch.Tensor] = {}
        for number, group in enumerate(groups):
            weight = _edge_weight(torch.from_numpy(edge.matrix(number).copy()), file, group[0].name)
            for m, rows, columns in blocks(group):
                part = weight[rows, columns]
                whole = stolen.setdefault(m.weight, torch.empty(m.shape))
                pieces = whole.view(m.parts, -1)
                pieces[m.part] = (part.T if m.transposed else part).reshape(-1)
                if m.bias:
                    bias = model.get_parameter(m.bias).data.view(m.parts, -1)
                    bias[m.part] = file.get_tensor(f"{m.name}.bias")
    for name, whole in stolen.items():
        layer, _, key = name.rpartition(".")
        # A tied head gets a matrix of its own: the embedding stays what it was.
        setattr(model.get_submodule(layer), key, torch.nn.Parameter(whole))
    return model.eval()


def _edge_weight(q: torch.Tensor, file: Any, leader: str) -> torch.Tensor:
    """W_edge in the original basis, float32 (sum N, K)."""
    weight = dequantise(q, file.get_tensor(f"{leader}.scales"))
    if f"{leader}.in_perm" not in file.keys():  # noqa: SIM118 - not a dict
        return weight
    return unblind(weight, *stored(file.get_tensor, leader))
