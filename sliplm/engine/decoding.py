"""How the next token is picked: the owner's settings in generation_config.json, and over them what a request says.

One request has one answer, drawn token by token: settings of other modes (beams, assistants, guidance) have no place
here. Each of the others is tried at start, so that none can fail a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import transformers as tf

from sliplm.protocol.messages import GenerateRequest

_OFF = {
    "min_length": 0,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "guidance_scale": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
}
"""Values that ask for nothing. Source: GenerationConfig of Transformers."""

_DEFAULTS = ("temperature", "top_p", "top_k")
"""For requests that do not say."""

_Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Make = Callable[[Any, int, list[int]], Any]

_PENALTIES: dict[str, _Make] = {
    "repetition_penalty": lambda value, *_: tf.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, *_: tf.NoRepeatNGramLogitsProcessor(value),
    "sequence_bias": lambda value, *_: tf.SequenceBiasLogitsProcessor(value),
    "bad_words_ids": lambda value, _, ends: tf.NoBadWordsLogitsProcessor(value, ends),
    "suppress_tokens": lambda value, *_: tf.SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda value, prompt, _: tf.SuppressTokensAtBeginLogitsProcessor(value, prompt),
    "min_length": lambda value, _, ends: tf.MinLengthLogitsProcessor(value, ends),
    "min_new_tokens": lambda value, prompt, ends: tf.MinNewTokensLengthLogitsProcessor(prompt, value, ends),
    "exponential_decay_length_penalty": lambda value, prompt, ends: tf.ExponentialDecayLengthPenalty(
        value, ends, prompt
    ),
}
_FILTERS: dict[str, _Make] = {
    "min_p": lambda value, *_: tf.MinPLogitsWarper(value),
    "typical_p": lambda value, *_: tf.TypicalLogitsWarper(value),
    "epsilon_cutoff": lambda value, *_: tf.EpsilonLogitsWarper(value),
    "eta_cutoff": lambda value, *_: tf.EtaLogitsWarper(value),
    "top_h": lambda value, *_: tf.TopHLogitsWarper(value),
}
"""Settings that hold for every request, and those that hold where tokens are drawn."""

_SILENT = ("output_", "assistant_", "num_assistant_", "cache_", "compile_", "transformers_", "_")
_SILENT_NAMES = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "max_length"),
    *("max_new_tokens", "use_cache", "max_cache_len", "return_dict_in_generate", "disable_compile", "low_memory"),
    *("is_assistant", "max_matching_ngram_size", "prompt_lookup_num_tokens", "prefill_chunk_size", "target_lookbehind"),
    *("continuous_batching_config", "speculation_type", "use_mtp"),
}
"""What changes no text, or is a request's or `stops.py`'s business: left out without a word."""

_log = logging.getLogger(__name__)


class Decoding:
    """What picks the tokens of every request.

    Attributes:
        ends: the tokens that end an answer.
        stop: texts of the owner's that end an answer, too.
    """

    def __init__(self, settings: tf.GenerationConfig, ends: list[int], vocabulary: int) -> None:
        """Logs one warning that names the settings which have no place here, or no effect with such values.

        `vocabulary` is the number of logits."""
        self.ends = ends
        self.stop: list[str] = []
        self._defaults: dict[str, Any] = {}
        self._owners: dict[str, Any] = {}
        dropped = []
        for name, value in settings.to_dict().items():
            if value is None or value == _OFF.get(name) or value in ([], {}):
                continue
            if name in _SILENT_NAMES or name.startswith(_SILENT):
                continue
            if not self._take(name, value, vocabulary):
                dropped.append(name)
        if dropped:
            names = ", ".join(sorted(dropped))
            _log.warning("generation_config.json: these settings have no effect on answers here: %s", names)

    def plain(self, max_new_tokens: int | None = None) -> tf.GenerationConfig:
        """What Transformers' `generate` has to know; all else is in `processors`."""
        end = self.ends[0] if self.ends else None
        return tf.GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends or None, pad_token_id=end
        )

    def processors(
        self, request: GenerateRequest, prompt_tokens: int, constraint: _Processor | None = None
    ) -> tf.LogitsProcessorList:
        """What the answer is held to, the owner's penalties and the request's, temperature and filters as Transformers
        applies them, and a draw from a generator of this request's own: Transformers would draw from the process-wide
        one, which all requests share."""
        found = tf.LogitsProcessorList(self._made(_PENALTIES, prompt_tokens))
        if request.frequency_penalty or request.presence_penalty:
            found.append(_penalise(request, prompt_tokens))
        if constraint is not None:
            found = tf.LogitsProcessorList([_within(constraint, found)])
        temperature = self._of(request, "temperature", 1.0)
        if temperature == 0:
            return found
        if temperature != 1:
            found.append(tf.TemperatureLogitsWarper(temperature))
        if top_k := self._of(request, "top_k", 0):
            found.append(tf.TopKLogitsWarper(top_k))
        if (top_p := self._of(request, "top_p", 1.0)) < 1:
            found.append(tf.TopPLogitsWarper(top_p))
        found += self._made(_FILTERS, prompt_tokens)
        found.append(_draw(request.seed))
        return found

    def _of(self, request: GenerateRequest, name: str, neutral: Any) -> Any:
        said = getattr(request, name)
        return self._defaults.get(name, neutral) if said is None else said

    def _made(self, table: dict[str, _Make], prompt_tokens: int) -> list[Any]:
        return [
            make(self._owners[name], prompt_tokens, self.ends) for name, make in table.items() if name in self._owners
        ]

    def _take(self, name: str, value: Any, vocabulary: int) -> bool:
        """Whether this setting has an effect from now on."""
        if name == "stop_strings":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
                return False
            self.stop = texts
            return True
        if name in _DEFAULTS:
            try:
                checked = msgspec.convert({"prompt": "", name: value}, GenerateRequest)
            except msgspec.ValidationError:
                return False
            self._defaults[name] = getattr(checked, name)
            return True
        make = _PENALTIES.get(name) or _FILTERS.get(name)
        if make is None:
            return False
        try:
            make(value, 1, self.ends)(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, vocabulary))
        except Exception:  # each of these classes has its own ways to refuse a value
            return False
        self._owners[name] = value
        return True


def _within(constraint: _Processor, penalties: Callable[..., torch.Tensor]) -> _Processor:
    """`penalties` among the tokens that `constraint` leaves. Where they forbid all of these they have no say: an
    answer to a schema has its tokens to repeat, to begin with and to end with."""

    def hold(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = constraint(ids, scores)
        # Some penalties make a number of minus infinity, or of what is none.
        wanted = penalties(ids, allowed).masked_fill(allowed == -torch.inf, -torch.inf)
        return wanted if wanted.isfinite().any() else allowed

    return hold


def _penalise(request: GenerateRequest, prompt_tokens: int) -> _Processor:
    def penalise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, prompt_tokens:], minlength=scores.shape[-1])
        return scores - request.frequency_penalty * counts - request.presence_penalty * (counts > 0)

    return penalise


def _draw(seed: int | None) -> _Processor:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pick = torch.multinomial(scores.float().softmax(-1), 1, generator=generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, pick, 0.0)

    return draw
