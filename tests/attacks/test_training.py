"""Training of attacks."""

from __future__ import annotations

import pytest
import torch

from sliplm.attacks import training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_used_only_where_the_processor_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    with training.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has else torch.float32)
