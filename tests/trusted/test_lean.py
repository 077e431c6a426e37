"""The short way through common decoder layers gives what Transformers' own way gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loading import attached

from sliplm import _core
from sliplm.split.model import Options, split_model
from sliplm.trusted.decoder import _Short

pytestmark = pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**TINY, attention_bias=True),
    "llama, wide heads": transformers.LlamaConfig(**TINY, head_dim=20),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None),
    "mistral, short window": transformers.MistralConfig(**TINY, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=16),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The original and the protected model."""
    directory = tmp_path_factory.mktemp("lean")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "original")
    split_model(str(directory / "original"), directory / "bundle", Options(rank=4))
    protected = attached(transformers.AutoModelForCausalLM.from_pretrained(directory / "bundle" / "trusted")).eval()
    return model, protected


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Notes for every call of a shortened layer whether it went the long way."""
    calls: list[bool] = []
    real = _Short.__call__

    def call(self: _Short, *args: Any, **kwargs: Any) -> Any:
        calls.append(False)
        long = self._long

        def longer(*a: Any, **k: Any) -> Any:
            calls[-1] = True
            return long(*a, **k)

        self._long = longer
        try:
            return real(self, *args, **kwargs)
        finally:
            self._long = long

    with monkeypatch.context() as patch:
        patch.setattr(_Short, "__call__", call)
        yield calls


def test_every_decoded_token_goes_the_short_way_and_is_right(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    original, protected = pair
    ids = torch.tensor([[5, 9, 2, 7, 1]])
    with counted(monkeypatch) as calls, torch.inference_mode():
        cache, kept = transformers.DynamicCache(config=protected.config), None
        got, want = [], []
        for chunk in (ids, *torch.randint(0, 96, (12, 1, 1))):
            got.append(protected(input_ids=chunk, past_key_values=cache, use_cache=True).logits[:, -1])
            out = original(input_ids=chunk, past_key_values=kept, use_cache=True)
            kept = out.past_key_values
            want.append(out.logits[:, -1])
    assert len(calls) == 2 * 13
    assert calls[:2] == [True, True]  # the prompt
    if "window" not in request.node.name:  # a window brings a mask sooner or later
        assert not any(calls[2:])
    difference = (torch.cat(got) - torch.cat(want)).square().mean().sqrt() / torch.cat(want).std()
    assert difference < 1e-3


def test_what_the_short_way_is_not_made_for_goes_the_long_way(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, protected = pair
    ids = torch.tensor([[5, 9, 2], [0, 3, 4]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with counted(monkeypatch) as calls:
        got = protected.generate(input_ids=ids, **settings)
    assert calls and all(calls)
    assert torch.equal(got, original.generate(input_ids=ids, **settings))
    alone, padded = torch.tensor([[0, 3, 4]]), {**settings, "attention_mask": torch.tensor([[0, 1, 1]])}
    with counted(monkeypatch) as calls:  # a single sequence, but a mask
        got = protected.generate(input_ids=alone, **padded)
    assert calls and all(calls)
    assert torch.equal(got, original.generate(input_ids=alone, **padded))
    one = torch.tensor([[5]])
    with counted(monkeypatch) as calls, torch.inference_mode():
        alone = protected(input_ids=one, use_cache=False).logits
    assert all(calls)
    assert torch.allclose(alone, original(input_ids=one, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize("isa", _core.native.isas() if _core.native else [])
def test_native_steps_equal_torch(isa: str) -> None:
    native = _core.native
    generator = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    for heads, groups, count, size in [(1, 1, 1, 2), (4, 2, 7, 20), (9, 3, 300, 64)]:
        q, k, v = draw(heads, size), draw(groups, count, size), draw(groups, count, size)
        out = np.empty_like(q)
        native.attend(q, k, v, 0.3, out, isa)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(torch.from_numpy(t)[None] for t in (q[:, None], k, v)), scale=0.3, enable_gqa=True
        )
        assert np.allclose(out, want[0, :, 0].numpy(), atol=1e-5)
    x, weight = draw(3, 37), draw(37)
    out = np.empty_like(x)
    native.rms_norm(x, weight, 1e-5, out, isa)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (37,), torch.from_numpy(weight), 1e-5)
    assert np.allclose(out, want.numpy(), atol=1e-6)


@pytest.mark.skipif(_core.native is None, reason="no native core: install a C++20 compiler")
@pytest.mark.parametrize("isa", _core.native.isas() if _core.native else [])
@pytest.mark.parametrize("kind", ["LowRank32", "LowRank16"])
@pytest.mark.parametrize(
    ("ranks", "rows", "cols"), [([1], [5], 3), ([8], [33], 16), ([21], [100], 67), ([16, 5, 24], [48, 7, 65], 130)]
)
def test_the_native_low_rank_part(isa: str, kind: str, ranks: list[int], rows: list[int], cols: int) -> None:
    """Right for 43 tokens (32, 8, and one by one), and bit for bit the same for each alone."""
    generator = np.random.default_rng(sum(ranks))
    cast, exact = (bits, rounded) if kind == "LowRank16" else (lambda t: t, lambda t: t.astype(np.float64))

    def draw(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    b, x = [draw(rank, cols) for rank in ranks], draw(43, cols)
    a, bias = [draw(n, rank) for n, rank in zip(rows, ranks, strict=True)], [None, *(draw(n) for n in rows[1:])]
    bt = np.concatenate([*b, np.zeros((-sum(ranks) % 16, cols), np.float32)]).T.copy()
    low_rank = getattr(_core.native, kind)(cast(bt), [cast(t.T.copy()) for t in a], bias)
    out = np.empty((43, sum(rows)), np.float32)
    low_rank.apply(x, out, isa)
    want = np.concatenate(
        [x @ exact(q).T @ exact(p).T + (0 if c is None else c) for p, q, c in zip(a, b, bias, strict=True)], axis=1
    )
    assert np.allclose(out, want, atol=1e-3)
    alone = np.empty((1, sum(rows)), np.float32)
    for t in range(43):
        low_rank.apply(x[t : t + 1], alone, isa)
        assert np.array_equal(alone[0], out[t])
    with pytest.raises(ValueError, match="shapes"):
        low_rank.apply(x, out[:42], isa)


def bits(t: np.ndarray) -> np.ndarray:
    return torch.from_numpy(t).bfloat16().view(torch.uint16).numpy()


def rounded(t: np.ndarray) -> np.ndarray:
    return torch.from_numpy(t).bfloat16().double().numpy()


def test_trusted_bundles_hold_factors_that_bfloat16_can_hold(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "original")
    split_model(str(tmp_path / "original"), tmp_path / "bundle", Options(rank=4))
    with safe_open(tmp_path / "bundle" / "trusted" / "model.safetensors", "pt") as file:
        factors = [file.get_tensor(name) for name in file.keys() if ".factor_" in name]  # noqa: SIM118 - no dictionary
    assert factors and all(torch.equal(f.bfloat16().float(), f) for f in factors)
