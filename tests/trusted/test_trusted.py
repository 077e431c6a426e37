"""The protected model inside Transformers: same results, few round trips, nothing unverified."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loading import attached

from sliplm.engine.builtin import BuiltinEngine
from sliplm.errors import BundleError, LinkError, NumericsError, RequestError, SlipError, VerificationError
from sliplm.exchange.link import Link
from sliplm.field import P
from sliplm.pads.pad import Pad
from sliplm.protocol.messages import Chunk, GenerateRequest, Message
from sliplm.split.model import Options, split_model
from sliplm.trusted import side


class Watching(Link):
    """Passes exchanges on to the real link, keeps what the edge sees, and may spoil the answers."""

    def __init__(self, inner: Link, spoil: Any = None) -> None:
        self.inner, self.spoil, self.seen, self.closed = inner, spoil, [], False
        self.party = inner.party

    def exchange(self, group: int, x: np.ndarray, own: Any) -> Any:
        if self.closed:
            raise LinkError("the link is closed.")
        self.seen.append((group, x.copy()))
        answer, mine = self.inner.exchange(group, x, own)
        return (self.spoil(answer) if self.spoil else answer), mine

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def original(tiny: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def protected(tiny_split: Path) -> Any:
    return attached(transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted")).eval()


def watch(model: Any, spoil: Any = None) -> Watching:
    link = Watching(model.slip.default_link, spoil)
    model.slip.default_link = link
    return link


IDS = torch.tensor([[5, 250, 0, 17, 17, 99, 3, 128], [1, 2, 3, 4, 5, 6, 7, 8]])


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).square().mean().sqrt() / want.std())


@pytest.mark.parametrize(
    "options",
    [
        Options(4),
        Options(4, camouflage=False),
        Options(4, blinding=False),
        Options(4, 1),
        Options(40),
        Options(1, 2, False, False),
    ],
)
def test_logits_equal_the_originals(options: Options, tiny: Path, original: Any, tmp_path: Path) -> None:
    split_model(str(tiny), tmp_path / "out", options)
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "trusted"))
    with torch.no_grad():
        error = relative_error(original(IDS).logits, model(IDS).logits)
    assert error < (1e-3 if options.planes == 2 else 0.1)


def test_generation_equals_the_originals(original: Any, protected: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # left padding
    for settings in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
        outs = []
        for model in (original, protected):
            torch.manual_seed(1)
            outs.append(model.generate(IDS, attention_mask=mask, max_new_tokens=12, **settings))
        assert torch.equal(*outs), settings


def test_a_group_is_one_round_trip(protected: Any) -> None:
    link = watch(protected)
    for mode in (torch.no_grad, torch.inference_mode):
        link.seen.clear()
        with mode():
            protected(IDS, use_cache=False)
        assert [g for g, _ in link.seen] == list(range(9))  # 4 per block, and the head


def test_the_original_weights_dtype_does_not_spoil_the_factors(tiny_split: Path, original: Any) -> None:
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted", dtype=torch.bfloat16))
    half = transformers.LlamaForCausalLM(original.config)
    half.load_state_dict(original.state_dict())
    half.to(torch.bfloat16)
    with torch.no_grad():
        want = original(IDS).logits
        ours, theirs = relative_error(want, model(IDS).logits.float()), relative_error(want, half(IDS).logits.float())
    assert ours < 1.5 * theirs


def test_what_the_edge_sees_is_uniform_and_never_repeats(protected: Any) -> None:
    link = watch(protected)
    with torch.no_grad():
        for _ in range(2):
            for _ in range(60):
                protected(IDS, use_cache=False)
    seen = [np.concatenate([x.reshape(-1) for _, x in half]) for half in (link.seen[:540], link.seen[540:])]
    values = np.concatenate(seen)
    assert values.size > 1_000_000 and values.max() < P
    for bits in (values >> 23, (values >> 12) & 0xFF, values & 0xFF):
        counts = np.bincount(bits, minlength=256)
        chi2 = float(((counts - values.size / 256) ** 2 / (values.size / 256)).sum())
        assert 130 < chi2 < 420  # 255 degrees of freedom: outside once in 10^8 runs
    # The same prompts again: positions that agree are as rare as chance.
    agree = int((seen[0] == seen[1]).sum())
    assert agree <= 3
    rows = [x[i].tobytes() for _, x in link.seen for i in range(len(x))]
    assert len(set(rows)) == len(rows)


def flip_one_bit(answer: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng()
    answer = answer.copy()
    answer[rng.integers(len(answer)), rng.integers(answer.shape[1])] ^= np.uint32(1 << int(rng.integers(31)))
    return answer


SPOILERS = {
    "one bit": flip_one_bit,
    "zero": np.zeros_like,
    "p instead of zero": lambda a: np.where(a == a[0, 0], (a + P).astype(np.uint32), a),
    "rows swapped": lambda a: np.roll(a, 1, axis=1),
    "tokens swapped": lambda a: a[::-1].copy() if len(a) > 1 else np.roll(a, 1),
    "too few rows": lambda a: a[:, :-1],
    "wider integers": lambda a: a.astype(np.int64),
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_wrong_answer_is_caught_and_the_link_closed(kind: str, protected: Any) -> None:
    link = watch(protected, SPOILERS[kind])
    with torch.no_grad(), pytest.raises(VerificationError):
        protected(IDS)
    assert len(link.seen) == 1 and link.closed
    with torch.no_grad(), pytest.raises(LinkError):
        protected(IDS)


def test_a_stale_answer_is_caught(protected: Any) -> None:
    answers: list[np.ndarray] = []

    def stale(answer: np.ndarray) -> np.ndarray:
        answers.append(answer)
        return next((a for a in answers[:-1] if a.shape == answer.shape), answer)

    watch(protected, stale)
    with torch.no_grad(), pytest.raises(VerificationError):
        protected(IDS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_no_number_names_its_layer(bad: float, protected: Any) -> None:
    x = torch.zeros(1, 2, 60)
    x[0, 1, 7] = bad
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        protected.model.layers[0].self_attn.q_proj(x)


def test_inputs_of_every_shape_and_scale(protected: Any, original: Any) -> None:
    layers = [m.model.layers[1].mlp.down_proj for m in (protected, original)]
    for x in (
        torch.zeros(2, 150),
        torch.full((1, 150), 1e-30),
        torch.randn(1, 1, 3, 150) * 1e6,
        torch.randn(150),
        torch.randn(0, 150),
        torch.randn(1100, 150),
        torch.cat([torch.randn(4, 149), torch.full((4, 1), 1e4)], 1),
    ):
        want, got = (layer(x).detach() for layer in layers[::-1])
        assert want.shape == got.shape
        assert torch.allclose(want, got, atol=2e-3 * float(want.abs().max()) if x.numel() else 0)


def test_members_called_out_of_order_or_alone(protected: Any, original: Any) -> None:
    a, b = protected.model.layers[0].self_attn, original.model.layers[0].self_attn
    x, y = torch.randn(3, 60), torch.randn(3, 60)
    for name, value in [("v_proj", x), ("q_proj", x), ("q_proj", y), ("k_proj", x), ("k_proj", x), ("v_proj", y)]:
        assert torch.allclose(getattr(a, name)(value), getattr(b, name)(value), atol=1e-2), name
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():  # changed in place between members: the pending answer is for another input
            z = torch.randn(3, 60)
            a.q_proj(z)
            z.numpy()[:] += 1
            assert torch.allclose(a.k_proj(z), b.k_proj(z), atol=1e-2)


def test_threads_do_not_mix_their_answers(protected: Any, original: Any) -> None:
    wrong = []

    def run(seed: int) -> None:
        ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for _ in range(5):
                if relative_error(original(ids).logits, protected(ids).logits) > 1e-3:
                    wrong.append(seed)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_no_weight_is_left_in_the_modules(protected: Any) -> None:
    names = [n for n, _ in protected.named_parameters()] + [n for n, _ in protected.named_buffers()]
    assert not [n for n in names if ("proj" in n or "lm_head" in n) and not n.endswith(".bias")]  # those can be read
    assert "protected" in repr(protected)


# --- the engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_split: Path) -> BuiltinEngine:
    return attached(BuiltinEngine(tiny_split / "trusted", stock=0))


def ask(engine: BuiltinEngine, **what: Any) -> tuple[str, Chunk]:
    chunks = list(engine.generate(GenerateRequest(**what), engine.model.slip.default_link))
    assert all(c.finish_reason is None for c in chunks[:-1])
    return "".join(c.text for c in chunks), chunks[-1]


def greedy(model: Any, engine: BuiltinEngine, prompt: str, tokens: int) -> str:
    inputs = engine.tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return engine.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # a part of a character is no text


def test_greedy_text_is_the_originals(engine: BuiltinEngine, original: Any) -> None:
    text, last = ask(engine, prompt="Hello", max_tokens=20)
    assert text == greedy(original, engine, "Hello", 20)
    assert last.finish_reason in ("length", "stop") and last.prompt_tokens == 5 and last.completion_tokens <= 20


def test_chat_uses_the_models_template(engine: BuiltinEngine, original: Any) -> None:
    text, _ = ask(engine, messages=[Message("user", "Hi")], max_tokens=10)
    assert text == greedy(original, engine, "user: Hi\nmodel: ", 10)


def test_stop_texts_end_the_answer_and_are_not_part_of_it(engine: BuiltinEngine) -> None:
    whole, _ = ask(engine, prompt="Hello", max_tokens=30)
    for begin in (3, 7):
        stop = whole[begin : begin + 3]
        text, last = ask(engine, prompt="Hello", max_tokens=30, stop=["never this", stop])
        assert text == whole[: whole.find(stop)] and last.finish_reason == "stop"
    text, last = ask(engine, prompt="Hello", max_tokens=30, stop=[whole[-1] + "and more"])
    assert text == whole


def test_a_seed_makes_sampling_repeatable(engine: BuiltinEngine) -> None:
    settings = {"prompt": "Hello", "max_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 50}
    assert ask(engine, **settings, seed=3) == ask(engine, **settings, seed=3)
    assert len({ask(engine, **settings)[0] for _ in range(4)}) > 1


def test_closing_the_iterator_stops_the_generation(engine: BuiltinEngine) -> None:
    link = Watching(engine.model.slip.default_link)
    chunks = engine.generate(GenerateRequest(prompt="Hello", max_tokens=100), link)
    next(chunks)
    chunks.close()
    count = len(link.seen)
    assert count < 100 * 9
    assert not [t for t in threading.enumerate() if t.name == "generate"]


def test_prompts_that_do_not_fit(engine: BuiltinEngine) -> None:
    for prompt, reason in (("x" * 128, "maximum context length is 128 tokens"), ("", "empty")):
        with pytest.raises(RequestError, match=reason):
            ask(engine, prompt=prompt)
    _, last = ask(engine, prompt="x" * 120, max_tokens=100)
    assert last.completion_tokens <= 8


def test_a_failing_edge_ends_the_stream_with_an_error_and_no_text(engine: BuiltinEngine) -> None:
    link = Watching(engine.model.slip.default_link, flip_one_bit)
    got = []
    with pytest.raises(VerificationError):
        got.extend(engine.generate(GenerateRequest(prompt="Hello"), link))
    assert not any(chunk.text for chunk in got)


def test_pads_are_used_once_over_a_whole_generation(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    mask = Pad.mask

    def noting(self: Pad) -> Any:
        rows = mask(self)
        masks.extend(row.tobytes() for row in rows)
        return rows

    monkeypatch.setattr(Pad, "mask", noting)
    ask(engine, prompt="Hello", max_tokens=10)
    ask(engine, prompt="Hello", max_tokens=10)
    assert len(masks) > 200 and len(set(masks)) == len(masks)


def test_a_bundle_whose_tensors_have_another_layout_is_refused_in_a_sentence(
    tiny_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.split.matrices.trusted_rank", lambda rank, *_: rank + 5)
    with pytest.raises(BundleError, match="split again"):
        transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted")


def test_vllm_tells_nobody_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    monkeypatch.setitem(sys.modules, "vllm", None)  # what matters is what is said before it is there
    with pytest.raises(SlipError, match="--engine vllm needs"):
        side._engine("vllm")
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
