"""Tokenizer files: tried before a split begins, and never half written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_tokenizer, save_tiny
from tokenizers import AddedToken

from sliplm.engine.builtin import BuiltinEngine
from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.split import tokenizer as tokenizer_module
from sliplm.split.model import Options, split_model

pytestmark = pytest.mark.slow

SLIP = [sys.executable, "-c", "from sliplm.cli import main; main()"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n"


def newer(content: bytes) -> bytes:
    """A kind of model that the installed library does not know."""
    value = json.loads(content)
    value["model"]["type"] = "NextYears"
    return json.dumps(value).encode()


def wordless(content: bytes) -> bytes:
    value = json.loads(content)
    value["model"]["vocab"], value["added_tokens"] = {}, []
    return json.dumps(value).encode()


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "pointer": lambda _: POINTER,
    "empty": lambda _: b"",
    "newer": newer,
    "wordless": wordless,
    "binary": lambda _: bytes(range(256)),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_cannot_be_read_are_refused_at_once(tmp_path: Path, damage: str) -> None:
    model = save_tiny(tmp_path / "model")
    file, change = model / "tokenizer.json", DAMAGES[damage]
    if change is None:
        file.unlink()  # tokenizer_config.json says that there is one
    else:
        file.write_bytes(change(file.read_bytes()))
    (model / "model.safetensors").unlink()  # which would be found missing by whatever looked at it first
    with pytest.raises(UnsupportedModelError, match="tokenizer") as caught:
        split_model(str(model), tmp_path / "out", Options(rank=4))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_the_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "tokenizer.json").write_bytes(newer((model / "tokenizer.json").read_bytes()))
    done = subprocess.run([*SLIP, "split", str(model), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("slip: ") == 1 and "the tokenizer of" in done.stderr


def test_a_model_without_a_tokenizer_is_split_and_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_tiny(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    split_model(str(model), tmp_path / "out", Options(rank=4))
    assert "no tokenizer, so `slip trusted` cannot serve it" in caplog.text
    with pytest.raises(BundleError, match="has no tokenizer"):
        BuiltinEngine(tmp_path / "out" / "trusted")
    done = subprocess.run([*SLIP, "trusted", str(tmp_path / "out" / "trusted")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "has no tokenizer" in done.stderr


def test_a_disk_that_is_full_before_the_tokenizer_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(directory: Path, what: Any) -> None:
        if (directory / "generation_config.json").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            save(directory, what)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save = tokenizer_module.save
    monkeypatch.setattr("sliplm.split.model.save", full)
    with pytest.raises(BundleError, match="the tokenizer cannot be written") as caught:
        split_model(str(model), tmp_path / "out", Options(rank=4))
    assert "too large" in str(caught.value).lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def with_tokens(tmp_path: Path, tokens: int, template: str | None = None) -> Path:
    """A model of so many tokens with a tokenizer of 259."""
    model = save_tiny(tmp_path / "model", vocab_size=tokens)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(model)
    return model


def test_tokens_that_the_model_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split_model(str(with_tokens(tmp_path, 257)), tmp_path / "out", Options(rank=4))
    assert "tokens that the model lacks, and prompts with them are refused: <|im_start|>, <|im_end|>" in caplog.text


def test_a_chat_template_that_the_model_lacks_tokens_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"puts <\|im_end\|> into its chat template.*has 258.*259"):
        split_model(str(with_tokens(tmp_path, 258, CHATML)), tmp_path / "out", Options(rank=4))


def test_a_beginning_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    model = with_tokens(tmp_path, 257)
    value = json.loads((model / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UnsupportedModelError, match=r"puts <\|im_start\|> into every prompt"):
        split_model(str(model), tmp_path / "out", Options(rank=4))


def test_a_model_with_room_to_spare_is_split_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split_model(str(with_tokens(tmp_path, 320, CHATML)), tmp_path / "out", Options(rank=4))
    assert caplog.text == ""
