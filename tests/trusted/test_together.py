"""Several sequences in one pass, for every family: each gives what it gives alone, or the model is not taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import zoo
from loading import attached

from sliplm import _core
from sliplm.trusted.cache import growing
from sliplm.trusted.packed import Packed, Part
from sliplm.trusted.padded import Padded, only_appends
from sliplm.trusted.together import find_way, rehearse

PACKED = {"Llama", "Qwen2", "Qwen3"}
PADDED = {"Phi (parallel blocks)", "Phi-3 (fused qkv, gate-up)", "GPT-2 (Conv1D)", "GPT-NeoX (parallel blocks)", "OPT",
          "OLMo 2", "Mixtral", "Qwen3-MoE"}  # fmt: skip
ONE_BY_ONE = {"Mistral", "Gemma 2", "Gemma 3", "gpt-oss (biased, interleaved experts)"}
"""Their layers forget what a window has passed."""


def test_every_family_has_its_way() -> None:
    assert {n for n, family in zoo.FAMILIES.items() if family.auto is zoo.CAUSAL} == PACKED | PADDED | ONE_BY_ONE


@pytest.mark.parametrize("name", sorted(PACKED | PADDED | ONE_BY_ONE))
def test_greedy_texts_are_those_of_each_alone(name: str, tmp_path: Path) -> None:
    original, model = zoo.halves(zoo.FAMILIES[name], tmp_path)
    way = find_way(model)
    if name in ONE_BY_ONE:
        assert way is None
        return
    assert type(way) is (Packed if name in PACKED and _core.native is not None else Padded)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (3, 11, 1, 24, 6)]
    caches, known = [way.cache() for _ in texts], [0] * len(texts)
    lengths = [len(text) for text in texts]
    with torch.inference_mode():
        for step in range(12):
            here = range(min(step + 1, len(texts)) if step < 9 else 3)  # they join one by one, and some leave
            parts = [Part(caches[i], known[i], texts[i][known[i] :], 1) for i in here]
            for i, row in zip(here, way.forward(parts), strict=True):
                known[i] = len(texts[i])
                texts[i].append(int(row.argmax()))
        for text, length in zip(texts, lengths, strict=True):
            logits = original(torch.tensor([text[:-1]])).logits[0, length - 1 :]
            picked = logits[range(len(logits)), text[length:]]
            assert (logits.amax(1) - picked < 6e-3 * logits.std()).all()  # the likeliest, or nearly as likely


@pytest.fixture(scope="module", params=["Llama", "GPT-2 (Conv1D)", "OPT"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return zoo.halves(zoo.FAMILIES[request.param], tmp_path_factory.mktemp("rehearsed"))[1]


class Wrong:
    """`way`, which does something else with what it is given, or with the model."""

    def __init__(self, model: Any, part: Any = None, **changes: Any) -> None:
        def call(**given: Any) -> Any:
            return model(**{k: changes[k](v) if k in changes else v for k, v in given.items()})

        self._way, self._part = Padded(call), part
        self._way.cache = lambda: growing(model.config)  # type: ignore[method-assign]
        self.cache = self._way.cache

    def forward(self, parts: list[Part]) -> torch.Tensor:
        return self._way.forward([self._part(p) if self._part else p for p in parts])


@pytest.mark.parametrize(
    "wrong",
    [
        {"position_ids": lambda p: p + 1 - p % 2},
        {"attention_mask": torch.ones_like},
        {"part": lambda p: p._replace(tokens=[*p.tokens[:-1], p.tokens[-1] ^ 1])},
    ],
)
def test_the_rehearsal_notices_what_is_wrong(model: Any, wrong: dict[str, Any]) -> None:
    assert rehearse(model, Wrong(model)) and not rehearse(model, Wrong(model, **wrong))


def test_a_model_that_takes_other_arguments_is_not_taken(model: Any) -> None:
    assert not rehearse(model, Wrong(model, use_cache=lambda _: 1 / 0))


def test_a_rehearsal_asks_no_edge_and_leaves_things_as_they_were(model: Any) -> None:
    before = model.slip.counters.exchanges, model.slip.pool.level
    assert rehearse(model, Padded(model))
    assert (model.slip.counters.exchanges, model.slip.pool.level) == before
    assert model.slip._link.get() is None


def test_what_a_failed_pass_left_behind_is_done_again(model: Any) -> None:
    way = Padded(model)
    cache = way.cache()
    with torch.inference_mode():
        first = [way.forward([Part(cache, 0, [5, 6, 7], 1)]) for _ in range(2)]
        then = [way.forward([Part(cache, 3, [8], 1)]) for _ in range(2)]
    for once, again in (first, then):
        assert torch.allclose(once, again, atol=1e-4 * float(once.std()))
    assert cache.get_seq_length() == 4


def test_models_with_caches_of_their_own_are_not_taken() -> None:
    config = transformers.LlamaConfig()
    assert only_appends(SimpleNamespace(config=config, _supports_default_dynamic_cache=lambda: True))
    assert not only_appends(SimpleNamespace(config=config, _supports_default_dynamic_cache=lambda: False))
    state_space = transformers.JambaConfig(num_hidden_layers=4)
    assert not only_appends(SimpleNamespace(config=state_space, _supports_default_dynamic_cache=lambda: True))
    unknown = SimpleNamespace(config=transformers.PretrainedConfig(), _supports_default_dynamic_cache=lambda: True)
    assert not only_appends(unknown)


def test_a_tiny_llama_goes_packed(tiny_split: Path) -> None:
    way = find_way(attached(transformers.AutoModelForCausalLM.from_pretrained(tiny_split / "trusted")).eval())
    assert type(way) is (Packed if _core.native is not None else Padded)
