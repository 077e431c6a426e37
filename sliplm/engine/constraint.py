"""Answers that must follow a JSON Schema, or must be calls: tokens that would leave it are masked before one is picked.

The grammar's work is llguidance's. What a schema may cost, which a device chooses, is limited: in bytes here, in the
time and memory of compiling it by trying that elsewhere first (`trial.py`), and in those of every step
(`sliplm/engine/grammar.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import llguidance
import numpy as np
import torch

from sliplm.engine import grammar
from sliplm.engine.tools import Syntax
from sliplm.engine.trial import Trials
from sliplm.errors import RequestError, SlipError
from sliplm.protocol.messages import GenerateRequest

MAX_GRAMMAR_BYTES = 1 << 16
"""Of the schemas of one request."""

TOO_COMPLEX = "the JSON schema is too complex to hold an answer to it."

_STYLE = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": r" ?|\n {0,32}"}}
"""Space as people write it; a model that may write as much as it likes can go on for ever."""

_MIXING = ("allOf", "if", "not", "dependentSchemas", "patternProperties", "unevaluatedProperties")
"""Where a schema has one of these, several of its parts may speak of one object."""


class Grammars:
    """Makes the constraints of a model's requests. Takes a second to make itself, for the tokenizer."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        """`ends` are the tokens that end an answer. Raises RequestError if this model's answers cannot be held to
        anything."""
        if not ends:
            raise RequestError("this model's answers cannot be held to a schema: no token ends them.")
        try:
            described = tokenizer.backend_tokenizer.to_str()
            self._tokens = grammar.load(described, sorted(ends))
            # llguidance's idea of a special token, which is wider than the tokenizer's: such a one is no text to it.
            added = tokenizer.added_tokens_decoder.items()
            self._special = {t.content: i for i, t in added if self._tokens.is_special_token(i)}
        except Exception:  # llguidance knows fewer kinds of tokenizers than Transformers
            sentence = "this model's answers cannot be held to a schema: its tokenizer does not allow it."
            raise RequestError(sentence) from None
        self._trials = Trials(described, sorted(ends))

    def close(self) -> None:
        self._trials.close()

    def constraint(self, request: GenerateRequest, syntax: Syntax | None, prompt_tokens: int) -> Constraint:
        """For an answer to `request`, whose calls are written in `syntax`. Raises RequestError for schemas that are
        wrong, not supported, or too much; BusyError if too many others wait."""
        rules: dict[str, str] = {}
        schemas: dict[str, dict[str, Any]] = {}
        if syntax is not None:
            names = request.must_call or [t.name for t in request.tools]
            called = [t for t in request.tools if t.name in names]
            joint = f"({self._text(syntax.joint)} call)*" if syntax.joint and request.parallel_calls else ""
            rules["calls"] = f"{self._text(syntax.head)} call {joint} {self._text(syntax.tail)}"
            rules["call"] = " | ".join(f"call{i}" for i in range(len(called)))
            for i, tool in enumerate(called):
                parameters = {"type": "object", **tool.parameters}
                if parameters["type"] != "object":
                    raise RequestError(f"the parameters of the function {tool.name} are not an object.")
                rules[f"call{i}"] = f"{self._text(tool.name + syntax.mid)} arguments{i}"
                schemas[f"arguments{i}"] = parameters
        if request.schema is not None and not request.must_call:
            schemas["content"] = request.schema
        rules |= _rules(schemas)
        start = " | ".join(rule for rule in ("calls", "content") if rule in rules)
        text = "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in rules.items())])
        try:
            self._trials.check(text)
            return Constraint(grammar.compiled(self._tokens, text), prompt_tokens)
        except ValueError as error:
            raise RequestError(f"the JSON schema is not supported: {error}." if str(error) else TOO_COMPLEX) from None

    def _text(self, text: str) -> str:
        """`text` in a grammar, special tokens by their number."""
        special = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        parts = re.split(f"({special})", text) if special else [text]
        return " ".join(f"<[{self._special[p]}]>" if p in self._special else json.dumps(p) for p in parts if p)


class Constraint:
    """A logits processor that leaves only tokens with which the answer can still follow the grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, prompt_tokens: int) -> None:
        self._matcher, self._seen = matcher, prompt_tokens
        self._allowed = np.zeros(0, bool)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raises RequestError if a step takes too much or no token is left; SlipError for a token that was not
        allowed, which is no fault of the request's."""
        new = ids[0, self._seen :].tolist()
        self._seen = ids.shape[1]
        if not self._allowed[new].all():
            raise SlipError("an answer left the schema that it was held to")
        followed = self._matcher.consume_tokens(new)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if not followed or self._matcher.is_error():
            raise RequestError(TOO_COMPLEX)
        width = scores.shape[-1]  # some models have more outputs than their tokenizer has tokens, and some fewer
        self._allowed = np.zeros(width, bool)
        known = np.unpackbits(bits, bitorder="little")[:width]
        self._allowed[: len(known)] = known
        if not self._allowed.any():
            raise RequestError("the answer cannot go on: this model has no token that the JSON schema allows.")
        return scores.masked_fill(~torch.from_numpy(self._allowed), -torch.inf)


def _rules(schemas: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Each schema as a rule. Raises RequestError if they are too large or too deep, before any other work."""
    try:
        texts = {rule: json.dumps(schema) for rule, schema in schemas.items()}
        if (size := sum(map(len, texts.values()))) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"the JSON schemas have {size} bytes; at most {MAX_GRAMMAR_BYTES} are possible.")
        return {rule: _rule(schema, texts[rule]) for rule, schema in schemas.items()}
    except (ValueError, RecursionError):
        raise RequestError("the JSON schema cannot be read: it is nested too deeply.") from None


def _rule(schema: dict[str, Any], text: str) -> str:
    mixed = any(f'"{word}"' in text for word in _MIXING)
    return "%json " + json.dumps({**(schema if mixed else _closed(schema)), **_STYLE})


def _closed(schema: Any) -> Any:
    """`schema`, whose objects that name their properties have no others, unless it says that they may: nobody asked for
    those, and a model that may always add one more can go on for ever. (OpenAI's strict mode wants it said.)"""
    if not isinstance(schema, dict) or ("properties" in schema and schema.keys() & {"anyOf", "oneOf", "$ref"}):
        return schema  # what these hold shares its properties
    closed: dict[str, Any] = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    for word, inner in schema.items():
        if word in ("properties", "$defs", "definitions") and isinstance(inner, dict):
            closed[word] = {name: _closed(part) for name, part in inner.items()}
        elif word in ("anyOf", "oneOf", "prefixItems") and isinstance(inner, list):
            closed[word] = [_closed(part) for part in inner]
        else:
            closed[word] = _closed(inner) if word in ("items", "additionalProperties") else inner
    return closed
