"""Tokenizers and chat templates of the kinds that people bring, and models that say what a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import save_tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sliplm.engine.builtin import BuiltinEngine
from sliplm.protocol.messages import Chunk, GenerateRequest
from sliplm.split.model import Options, split_model

WORDS = ["▁", "▁▁▁", "▁Paris", "▁is", "▁return", "Par", "is", "▁The", "▁Hello", ":", "."]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
MARKERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>"]
MARKERS += ["<start_of_turn>", "[INST]", "[/INST]", "<|call|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def llama_tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """As of Llama 2: a space is put before every text, and its decoder takes one away; unknown characters are bytes."""
    special = ["<unk>", "<s>", "</s>"]
    words = [*WORDS, *(chr(c) for c in range(33, 127))]
    pieces = [(w, -float(len(words) + 1 - len(w))) for w in dict.fromkeys(words)]
    vocabulary = [(s, 0.0) for s in special] + [(b, -99.0) for b in BYTES] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in MARKERS])
    tokenizer.add_tokens([AddedToken("<plain_end>", special=False)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def make_bundle(directory: Path, tokenizer: Any, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A split model of random weights with this tokenizer and these generation settings; its trusted side."""
    model = save_tiny(directory / "model", vocab_size=len(tokenizer), **config)
    for old in (*model.glob("tokenizer*"), *model.glob("*.jinja")):
        old.unlink()
    tokenizer.save_pretrained(model)
    if generation is not None:
        settings = transformers.GenerationConfig(**generation)
        settings.save_pretrained(model)
    split_model(str(model), directory / "bundle", Options(rank=4))
    return directory / "bundle" / "trusted"


def say(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, tokens: list[int | str], **what: Any
) -> tuple[str, Chunk]:
    """The engine's text and last chunk where the model's likeliest tokens are these, one after the other."""
    ids = [t if isinstance(t, int) else engine.tokenizer.convert_tokens_to_ids(t) for t in tokens]
    steps = iter(ids)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], len(engine.tokenizer))
        logits[..., next(steps, ids[-1])] = 30.0
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.get_output_embeddings(), "forward", forward)
        request = GenerateRequest(**{"max_tokens": len(ids), **what})
        chunks = list(engine.generate(request, engine.model.slip.default_link))
    assert all(c.finish_reason is None for c in chunks[:-1])
    return "".join(c.text for c in chunks), chunks[-1]
