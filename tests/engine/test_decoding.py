"""The owner's generation settings: what makes sense for one answer is honoured, the rest never fails a request."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import attached
from tiny import save_tiny

from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.decoding import Decoding
from sliplm.errors import UnsupportedModelError
from sliplm.protocol.messages import GenerateRequest
from sliplm.split.model import Options, split_model

VOCABULARY = 8


def decoding(caplog: pytest.LogCaptureFixture, **settings: Any) -> Decoding:
    caplog.set_level(logging.WARNING, logger="sliplm")
    config = transformers.GenerationConfig(**settings)
    caplog.clear()  # Transformers has its own opinion of some
    return Decoding(config, [7], VOCABULARY)


def kinds(made: Decoding, **request: Any) -> list[str]:
    found = made.processors(GenerateRequest(prompt="x", **request), 2)
    return [getattr(p, "__name__", type(p).__name__) for p in found]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 0.8}, "early_stopping, length_penalty, num_beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "diversity_penalty, num_beam"),
        ({"num_beams": 4, "num_return_sequences": 4}, "num_beams, num_return_sequences"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"constraints": [1], "force_words_ids": [[3]], "num_beams": 2}, "constraints, force_words_ids, num_beams"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
        ({"token_healing": True, "max_time": 3.0}, "max_time, token_healing"),
        ({"a_key_of_somebodys": [1]}, "a_key_of_somebodys"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"bad_words_ids": [[999]]}, "bad_words_ids"),
        ({"temperature": 7.0, "top_p": 3.0, "top_k": -2}, "temperature, top_k, top_p"),
        ({"min_p": 9.0, "typical_p": -1.0}, "min_p, typical_p"),
        ({"stop_strings": [""]}, "stop_strings"),
    ],
)
def test_what_has_no_place_here_is_named_once_and_has_no_effect(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], names: str
) -> None:
    made = decoding(caplog, **settings)
    assert len(caplog.records) == 1 and names in caplog.text
    assert kinds(made) == [] and kinds(made, temperature=None) == ["draw"] and made.stop == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 1, "do_sample": True, "repetition_penalty": 1.0, "length_penalty": 1.0, "min_length": 0},
        {"max_length": 4096, "max_new_tokens": 2048, "use_cache": False, "cache_implementation": "hybrid"},
        {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.3, "output_scores": True, "pad_token_id": 3},
    ],
    ids=str,
)
def test_what_changes_no_text_is_not_worth_a_word(caplog: pytest.LogCaptureFixture, settings: dict[str, Any]) -> None:
    assert kinds(decoding(caplog, **settings)) == [] and not caplog.records


def test_the_owners_temperature_and_filters_hold_where_a_request_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    made = decoding(caplog, do_sample=True, temperature=0.6, top_p=0.9, top_k=5, min_p=0.05, typical_p=0.9)
    own = made.processors(GenerateRequest(prompt="x", temperature=None), 2)
    assert [type(p).__name__.removesuffix("LogitsWarper") for p in own[:-1]] == [
        *("Temperature", "TopK", "TopP", "MinP", "Typical")
    ]
    assert (own[0].temperature, own[1].top_k, own[2].top_p, own[3].min_p) == (0.6, 5, 0.9, 0.05)
    said = made.processors(GenerateRequest(prompt="x", temperature=0.8, top_k=0, top_p=1.0), 2)
    assert said[0].temperature == 0.8 and len(said) == 4
    assert kinds(made, temperature=0.0) == [] and not caplog.records
    greedy = decoding(caplog, temperature=0.0, top_k=5)
    assert kinds(greedy, temperature=None) == []


def test_the_owners_penalties_hold_for_every_request(caplog: pytest.LogCaptureFixture) -> None:
    made = decoding(
        caplog,
        repetition_penalty=2.0,
        suppress_tokens=[1],
        bad_words_ids=[[2]],
        no_repeat_ngram_size=3,
        min_new_tokens=2,
        stop_strings=["END"],
    )
    assert not caplog.records and made.stop == ["END"]
    processors = made.processors(GenerateRequest(prompt="x"), prompt_tokens=2)
    row = processors(torch.tensor([[3, 3]]), torch.full((1, VOCABULARY), 4.0))[0].tolist()
    assert row == [4.0, -torch.inf, -torch.inf, 2.0, 4.0, 4.0, 4.0, -torch.inf]  # 7 ends, which is too early


PENALTIES: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(VOCABULARY))},
    {"begin_suppress_tokens": list(range(VOCABULARY))},
    {"bad_words_ids": [[i] for i in range(VOCABULARY - 1)]},
    {"min_new_tokens": 5},
    {"min_length": 50},
    {"exponential_decay_length_penalty": [0, 1.5]},
    {"repetition_penalty": 2.0, "sequence_bias": [[[3], -9.0]]},
]


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("left", [[3], [7], [3, 4]], ids=str)
def test_a_constraint_beats_the_owners_penalties(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], temperature: float, left: list[int]
) -> None:
    """A schema may leave one token, as a penalty may all others."""
    made = decoding(caplog, **settings, min_p=0.05, typical_p=0.9, eta_cutoff=0.01, epsilon_cutoff=0.01)
    assert not caplog.records

    def constraint(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, left] = scores[:, left]
        return allowed

    request = GenerateRequest(prompt="x", temperature=temperature, top_k=2, top_p=0.9)
    processors = made.processors(request, 2, constraint)
    scores = processors(torch.tensor([[3, 3]]), torch.randn(1, VOCABULARY))
    assert int(scores.argmax()) in left and not scores.isnan().any()
    penalised = made.processors(GenerateRequest(prompt="x"), 2, constraint)
    ids = torch.tensor([[3, 3]])
    if settings == {"no_repeat_ngram_size": 1} and left == [3, 4]:  # they hold among what is left
        assert int(penalised(ids, torch.arange(8, 0, -1).float()[None]).argmax()) == 4


SETTINGS = {
    "beams": {"num_beams": 4, "early_stopping": True},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "stop": {"stop_strings": ["Z"]},
    "guidance": {"guidance_scale": 1.5},
    "unknown": {"chat_format": "chatml"},
    "penalty": {"repetition_penalty": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_requests_are_answered_whatever_the_settings_say(tiny_split: Path, name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(SETTINGS[name]))
    split_model(str(model), tmp_path / "bundle", Options(rank=4))
    texts = []
    for bundle in (tmp_path / "bundle", tiny_split):
        engine = attached(BuiltinEngine(bundle / "trusted", stock=0))
        request = GenerateRequest(prompt="Hello", max_tokens=8)
        chunks = list(engine.generate(request, engine.model.slip.default_link))
        texts.append("".join(c.text for c in chunks))
        assert chunks[-1].finish_reason
    assert texts[0] == texts[1].partition("Z" if name == "stop" else "never")[0]


def test_decoding_settings_in_the_models_configuration_fail_no_request(tmp_path: Path) -> None:
    """Old checkpoints have them there."""
    model = save_tiny(tmp_path / "model")
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_beams": 4, "repetition_penalty": 1.2}))
    split_model(str(model), tmp_path / "bundle", Options(rank=4))
    engine = attached(BuiltinEngine(tmp_path / "bundle" / "trusted", stock=0))
    request = GenerateRequest(prompt="Hello", max_tokens=4)
    assert list(engine.generate(request, engine.model.slip.default_link))[-1].finish_reason


@pytest.mark.parametrize(
    "content", ["{", "", "version https://git-lfs.github.com/spec/v1\n", '{"early_stopping": "yes"}']
)
def test_settings_that_cannot_be_read_are_refused_before_the_split(tmp_path: Path, content: str) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json"):
        split_model(str(model), tmp_path / "out", progress=lambda *_: pytest.fail("the split had begun"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
