"""The short way through common decoder layers gives what Transformers' own way gives."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from loading import attached

from sliplm import _core
from sliplm.split.model import Options, split_model
from sliplm.trusted.decoder import Short

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
    real = Short.__call__

    def call(self: Short, *args: Any, **kwargs: Any) -> Any:
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
        patch.setattr(Short, "__call__", call)
        yield calls


def test_every_decoded_token_goes_the_short_way_and_is_right(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
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
    assert not any(calls[2:])
    difference = (torch.cat(got) - torch.cat(want)).square().mean().sqrt() / torch.cat(want).std()
    assert difference < 1e-3


@contextmanager
def attention(*models: Any, how: str) -> Iterator[None]:
    """Sets how masks come: "sdpa" booleans, "eager" what is added to scores."""
    for model in models:
        model.set_attn_implementation(how)
    yield
    for model in models:
        model.set_attn_implementation("sdpa")


SETTINGS: dict[str, Any] = {
    "max_new_tokens": 9,
    "min_new_tokens": 9,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def assert_same(got: Any, want: Any, row: int = 0, of: int = 0) -> None:
    """That row `of` of `got` has the text and the logits of that `row` of `want`; where two tokens are as likely, up to
    the rounding of the protected weights, either may come, and what follows is another text."""
    new = len(want.logits)
    texts = got.sequences[of, -new:].tolist(), want.sequences[row, -new:].tolist()
    for ours, theirs, mine, other in zip(got.logits, want.logits, *texts, strict=True):
        assert torch.allclose(ours[of], theirs[row], atol=3e-3 * float(theirs[row].std()))
        if mine != other:
            assert abs(theirs[row, mine] - theirs[row, other]) < 6e-3 * theirs[row].std()
            return


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [(0, 3, 1), (0, 0, 0), (2, 2, 2)])
def test_a_batch_goes_the_short_way_and_gives_the_texts_of_its_sequences(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, padding: tuple[int, ...], how: str
) -> None:
    original, protected = pair
    ids = torch.randint(1, 96, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5) >= torch.tensor(padding)[:, None]).long()
    with attention(original, protected, how=how):
        with counted(monkeypatch) as calls:
            got = protected.generate(input_ids=ids * mask, attention_mask=mask, **SETTINGS)
        want = original.generate(input_ids=ids * mask, attention_mask=mask, **SETTINGS)
    assert calls == [True] * 2 + [False] * 16  # the prompt, and a token less than there are
    for row, skip in enumerate(padding):
        assert_same(got, want, row, row)
        alone = ids[row : row + 1, skip:]
        assert_same(protected.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **SETTINGS), want, row)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 0, 1, 1]]])
def test_other_masks_go_the_long_way(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, mask: list[list[int]]
) -> None:
    """Padding on the right, and a hole."""
    original, protected = pair
    ids = torch.tensor([[5, 9, 2, 3], [8, 3, 4, 1]])
    settings = SETTINGS | {"max_new_tokens": 3, "min_new_tokens": 3}  # so few that no window closes over the padding
    with counted(monkeypatch) as calls:
        got = protected.generate(input_ids=ids, attention_mask=torch.tensor(mask), **settings)
    assert calls and all(calls)
    want = original.generate(input_ids=ids, attention_mask=torch.tensor(mask), **settings)
    for row in range(2):
        assert_same(got, want, row, row)


def test_what_the_short_way_is_not_made_for_goes_the_long_way(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, protected = pair
    one = torch.tensor([[5]])
    with counted(monkeypatch) as calls, torch.inference_mode():
        alone = protected(input_ids=one, use_cache=False).logits
    assert all(calls)
    assert torch.allclose(alone, original(input_ids=one, use_cache=False).logits, atol=1e-3)
    bias = torch.tensor([-0.5, 0, 0]).expand(2, 1, 1, 3)  # added to scores, and no mask
    steps = torch.tensor([[5, 9], [3, 7]]), torch.tensor([[2], [4]])
    logits = []
    for model in pair:
        with attention(model, how="eager"), counted(monkeypatch) as calls, torch.inference_mode():
            cache = model(input_ids=steps[0], use_cache=True).past_key_values
            logits.append(model(input_ids=steps[1], attention_mask=bias, past_key_values=cache).logits)
        assert all(calls)
    assert torch.allclose(*logits, atol=2e-3)


def test_a_step_takes_few_calls_however_many_sequences(pair: tuple[Any, Any]) -> None:
    _, protected = pair
    counts = []
    for rows, padded in ((1, 0), (6, 0), (6, 1)):
        calls = Counter[str]()

        def note(frame: FrameType, event: str, _: Any, calls: Counter[str] = calls) -> None:
            if event == "call" and Path(frame.f_code.co_filename).name in ("decoder.py", "cache.py", "cache_utils.py"):
                calls[frame.f_code.co_name] += 1

        mask = torch.ones(rows, 4, dtype=torch.long)
        mask[:1, :padded] = 0
        with torch.inference_mode():
            cache = protected(input_ids=torch.ones(rows, 3, dtype=torch.long), use_cache=True).past_key_values
            ids = torch.ones(rows, 1, dtype=torch.long)
            protected(input_ids=ids, attention_mask=mask, past_key_values=cache)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            sys.setprofile(note)
            protected(input_ids=ids, attention_mask=mask, past_key_values=cache)
            sys.setprofile(None)
        counts.append(calls)
    one, many, of_different_lengths = (calls.total() for calls in counts)
    assert one == many < 2 * 24 and of_different_lengths <= one + 2 * 4, counts


@pytest.mark.parametrize("isa", _core.native.isas() if _core.native else [])
def test_attention_of_a_batch_equals_torch(isa: str) -> None:
    native = _core.native
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for rows, heads, groups, count, size in [(1, 1, 1, 1, 2), (3, 4, 2, 7, 20), (2, 9, 3, 300, 64), (5, 14, 2, 33, 16)]:
        # Heads and caches as they come: parts of larger arrays.
        q, k, v = draw(rows, heads + 3, size)[:, :heads], *(draw(rows, groups, count + 5, size) for _ in "kv")
        k, v = k[:, :, :count], v[:, :, 3 : 3 + count]
        for starts in (None, torch.randint(count, (rows,), generator=generator)):
            out = np.empty((rows, heads, size), np.float32)
            native.attend(q.numpy(), k.numpy(), v.numpy(), None if starts is None else starts.numpy(), 0.3, out, isa)
            seen = torch.arange(count) >= (torch.zeros(rows, 1) if starts is None else starts[:, None])
            want = torch.nn.functional.scaled_dot_product_attention(
                q[:, :, None].double(), k.double(), v.double(), seen[:, None, None], scale=0.3, enable_gqa=True
            )
            assert np.allclose(out, want[:, :, 0].numpy(), atol=2e-6)
    far = torch.tensor([[[[-3e4, 0.0]] + [[3e4, 0.0]] * 16]])  # weights that vanish
    values = torch.arange(34.0).view(1, 1, 17, 2)
    out = np.empty((1, 1, 2), np.float32)
    native.attend(np.ones((1, 1, 2), np.float32), far.numpy(), values.numpy(), None, 1.0, out, isa)
    assert np.allclose(out, values[0, 0, 1:].mean(0))
    far[0, 0, 3, 0] = torch.nan
    native.attend(np.ones((1, 1, 2), np.float32), far.numpy(), values.numpy(), None, 1.0, out, isa)
    assert np.isnan(out).all()


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=6)))
def test_first_seen_is_where_a_run_begins_that_ends_the_row(mask: np.ndarray) -> None:
    first = np.empty(len(mask), np.int64)
    runs = [row.tolist() == sorted(row) and row.any() for row in mask]
    for given_mask in (mask, np.asfortranarray(mask)):
        assert _core.native.first_seen(given_mask, first) == all(runs)
        assert not all(runs) or np.array_equal(first, (~mask).sum(axis=1))


def test_what_does_not_fit_is_refused() -> None:
    native = _core.native
    q, k, out = (np.zeros(shape, np.float32) for shape in ((2, 4, 8), (2, 2, 3, 8), (2, 4, 8)))
    native.attend(q, k, k, np.array([0, 2]), 1.0, out)
    for starts in ([0, 3], [-1, 0], [0]):
        with pytest.raises(ValueError, match=r"start|shapes"):
            native.attend(q, k, k, np.array(starts), 1.0, out)
    for bad in (k[:1], k[:, :, :, :7], k[:, :, :2], np.zeros((2, 3, 3, 8), np.float32), k[:, :, :0]):
        with pytest.raises(ValueError, match="shapes"):
            native.attend(q, bad, k, None, 1.0, out)
    with pytest.raises(ValueError, match="shapes"):
        native.rotate(q, q[:1, 0], q[:1, 0, ::2].copy())
    with pytest.raises(ValueError, match="shapes"):
        native.rotate(q.transpose(0, 2, 1), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("isa", _core.native.isas() if _core.native else [])
def test_native_steps_equal_torch(isa: str) -> None:
    native = _core.native
    generator = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    heads, cos, sin = draw(3, 7, 10), draw(3, 10), draw(3, 10)
    for many in (1, 3):
        got = heads.copy()
        native.rotate(got[:, :5], cos[:many], sin[:many], isa)
        half = np.concatenate([-heads[..., 5:], heads[..., :5]], -1)
        want = heads * cos[:many, None] + half * sin[:many, None]
        assert np.allclose(got[:, :5], want[:, :5], atol=1e-6) and np.array_equal(got[:, 5:], heads[:, 5:])
    x, weight = draw(3, 37), draw(37)
    out = np.empty_like(x)
    native.rms_norm(x, weight, 1e-5, out, isa)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (37,), torch.from_numpy(weight), 1e-5)
    assert np.allclose(out, want.numpy(), atol=1e-6)
    both = 30 * draw(3, 2 * 37)
    both[0, :6] = 0, -0.0, 87.5, -87.5, 1e30, -1e30
    native.gated(both, out, isa)
    gate, up = torch.from_numpy(both).double().chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * up
    assert np.allclose(out, want.numpy(), rtol=1e-6, atol=1e-30)
    both[1, 3], both[2, 36] = np.nan, np.inf
    native.gated(both, out, isa)
    assert np.isnan(out[1, 3]) and np.isinf(out[2, 36]) and np.isfinite(np.delete(out, [37 + 3, 74 + 36])).all()
    for bad in (both[:2], both[:, :73].copy()):
        with pytest.raises(ValueError, match="shapes"):
            native.gated(bad, out, isa)


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


def test_trusted_bundles_hold_factors_in_bfloat16(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "original")
    split_model(str(tmp_path / "original"), tmp_path / "bundle", Options(rank=4))
    with safe_open(tmp_path / "bundle" / "trusted" / "model.safetensors", "pt") as file:
        factors = [file.get_tensor(name) for name in file.keys() if ".factor_" in name]  # noqa: SIM118 - no dictionary
    assert factors and all(f.dtype == torch.bfloat16 for f in factors)
