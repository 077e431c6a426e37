"""The table of embeddings stays in the bundle's file; what is looked up is what a converted table would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import attached
from safetensors.torch import load_file
from tiny import save_tiny
from torch import nn

from sliplm.split.model import Options, split_model
from sliplm.trusted.embedding import MappedEmbedding, map_table

IDS = torch.tensor([[5, 9, 2, 7, 1]])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_a_converted_table(stored: torch.dtype, asked: torch.dtype) -> None:
    plain = nn.Embedding(20, 6, padding_idx=0).to(stored)
    mapped = MappedEmbedding(plain.to(asked))
    table = torch.randn(20, 6).to(stored)
    mapped.bind(table)
    got = mapped(IDS)
    assert got.dtype == asked and torch.equal(got, table.to(asked)[IDS])
    assert mapped.double()(IDS).dtype == torch.float64 and mapped.weight.dtype == torch.float64
    assert not list(mapped.parameters()) and not mapped.state_dict()
    with pytest.raises(IndexError):
        mapped(torch.tensor([20]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_has_its_table_in_the_file(tmp_path: Path, tied: bool) -> None:
    directory = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    split_model(str(directory), tmp_path / "out", Options(rank=4))
    protected = attached(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "trusted"))
    table = protected.get_input_embeddings()
    assert isinstance(table, MappedEmbedding) and protected.dtype == torch.float32
    stored = load_file(tmp_path / "out" / "trusted" / "model.safetensors")
    like = {name: t.dtype for name, t in stored.items() if t.shape == model.get_input_embeddings().weight.shape}
    assert like == {"model.embed_tokens.weight": torch.bfloat16}
    assert torch.equal(table(IDS), model.get_input_embeddings()(IDS).float())
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = table._table.data_ptr()
        spans = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
        found = [s[5] for s in spans if int(s[0].split("-")[0], 16) <= address < int(s[0].split("-")[1], 16)]
        assert found == [str(tmp_path / "out" / "trusted" / "model.safetensors")]
    with torch.no_grad():
        want, got = model.float()(IDS).logits, protected(IDS).logits
        protected.tie_weights()
        again = protected(IDS).logits
    assert (want - got).std() < 1e-3 * want.std() and torch.allclose(got, again, atol=1e-3)


class _Of(nn.Module):
    """A model as far as `map_table` asks."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = self.again = table

    def get_input_embeddings(self) -> nn.Module:
        return self.table


class _Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


def test_only_plain_tables_that_nothing_is_tied_to_are_mapped() -> None:
    model: Any = _Of(nn.Embedding(4, 2))
    name, mapped = map_table(model, {}) or ("", None)
    assert name == "table.weight" and model.table is mapped and model.again is mapped
    for table, tied in (
        (nn.Embedding(4, 2), {"head.weight": "table.weight"}),
        (nn.Embedding(4, 2), {"table.weight": "head.weight"}),
        (nn.Embedding(4, 2, max_norm=1.0), {}),
        (_Scaled(4, 2), {}),
        (nn.Linear(4, 2), {}),
    ):
        model = _Of(table)
        assert map_table(model, tied) is None and model.table is table
