"""The model's tokenizer and generation settings: tried before a split begins, written at its end."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import transformers

from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.split.files import refuse_pointer
from sliplm.split.source import locate

logger = logging.getLogger(__name__)
FILES = ("tokenizer*.json", "tokenizer*.model", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken", "tekken.json")
GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")


def has_tokenizer(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in FILES)


def has_vocabulary(directory: Path) -> bool:
    """Whether there are files of a tokenizer, and not its settings alone."""
    return any(file.name != SETTINGS for pattern in FILES for file in directory.glob(pattern))


def read_tokenizer(model: str) -> Any:
    """The tokenizer of `model` (directory, .gguf file or hub id), after a try; None if the model has no such files.

    Raises UnsupportedModelError for files that cannot be read."""
    path, arguments = locate(model)
    if not arguments and not has_tokenizer(path):
        return None
    for pattern in FILES + TEMPLATES:
        for file in path.glob(pattern):
            _check_content(file)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **arguments)
        works = bool(tokenizer("Hello")["input_ids"])
    except Exception as error:  # Transformers raises whatever its parsers do
        raise UnsupportedModelError(_unreadable(model, f"{type(error).__name__}: {_first_line(error)}")) from None
    if not works:
        raise UnsupportedModelError(_unreadable(model, "it makes no token of a word"))
    return tokenizer


def check_ids(tokenizer: Any, rows: int) -> None:
    """Compare the tokens with a model that has `rows` of them: a warning names those that it lacks.

    Raises:
        UnsupportedModelError: the model lacks what every prompt, or every chat, gets from the server.
    """
    beyond = {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]) if i >= rows}
    if not beyond:
        return
    given = {"every prompt": tokenizer("")["input_ids"], "its chat template": _chat(tokenizer)}
    for what, ids in given.items():
        if lacking := [beyond[i] for i in ids if i in beyond]:
            raise UnsupportedModelError(
                f"the tokenizer puts {lacking[0]} into {what}, and the model has no such token: it has {rows}, and the "
                f"tokenizer {max(beyond) + 1}; the two do not belong together."
            )
    shown = ", ".join(list(beyond.values())[:4]) + (f" and {len(beyond) - 4} more" if len(beyond) > 4 else "")
    logger.warning("the tokenizer has tokens that the model lacks, and prompts with them are refused: %s", shown)


def _chat(tokenizer: Any) -> list[int]:
    """What the chat template makes of one message; nothing if there is none, or it cannot be used."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception:  # templates raise what they like; the server says then that it has no chats
        return []


def read_generation(model: str) -> transformers.GenerationConfig | None:
    """The settings in generation_config.json, None if there is no such file.

    Raises UnsupportedModelError for a file that Transformers refuses; it does not load the original then, either."""
    path, arguments = locate(model)
    file = path / GENERATION
    if arguments or not file.exists():
        return None
    _check_content(file)
    try:
        return transformers.GenerationConfig.from_pretrained(str(path))
    except Exception as error:  # as above
        raise UnsupportedModelError(f"{file} cannot be used ({_first_line(error)}).") from None


def save(directory: Path, what: Any) -> None:
    """Write a tokenizer or generation settings. Raises BundleError, for example when the disk is full."""
    kind = GENERATION if isinstance(what, transformers.GenerationConfig) else "tokenizer"
    try:
        what.save_pretrained(str(directory))
    except Exception as error:  # the tokenizers library raises plain Exceptions for a full disk, too
        raise BundleError(f"the {kind} cannot be written to {directory.parent}: {_first_line(error)}.") from None


def _check_content(file: Path) -> None:
    refuse_pointer(file)
    if file.suffix == ".json" and not file.stat().st_size:
        raise UnsupportedModelError(f"{file} is empty.")


def _unreadable(model: str, why: str) -> str:
    return f"the tokenizer of {model} cannot be read ({why}): without its files, the split makes a model without one."


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0].rstrip(".:")
    return type(error).__name__
