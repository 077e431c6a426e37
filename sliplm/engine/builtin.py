"""Text in, text out: generation with the protected model for several requests at a time, those over one link together
where the model allows it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import transformers

import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle
from sliplm import bundle
from sliplm.engine.alone import Alone
from sliplm.engine.answer import Answer
from sliplm.engine.batch import Batches
from sliplm.engine.constraint import Constraint, Grammars
from sliplm.engine.decoding import Decoding
from sliplm.engine.detokenise import UNFINISHED, Text, special_tokens
from sliplm.engine.drafting import LOOKUP, NONE, Drafting
from sliplm.engine.logprobs import Logprobs, Scores
from sliplm.engine.once import Once
from sliplm.engine.sequence import Sequence
from sliplm.engine.stops import StopTexts, end_tokens
from sliplm.engine.template import Chat, unknown_token
from sliplm.engine.tools import Syntax, find_syntax
from sliplm.errors import BundleError, RequestError, SlipError, TooLongError
from sliplm.exchange.link import Link, Router
from sliplm.naming import model_name
from sliplm.protocol.messages import MAX_TOKENS, Chunk, GenerateRequest, Message, Tool
from sliplm.split.source import refuse_other_tasks
from sliplm.split.tokenizer import has_tokenizer
from sliplm.trusted.together import Together, find_way

GENERATIONS = 16
"""So many may run at a time; each holds a cache as long as its text."""

MAX_CONTEXT = 1 << 20
DEFAULT_CONTEXT = 1 << 15
"""Tokens of a model that names no limit of its own."""

_log = logging.getLogger(__name__)


class BuiltinEngine:
    """A trusted bundle, loaded and ready to generate over links to its edges.

    Attributes:
        model: the Transformers model; `model.slip` is its runtime.
        tokenizer: the model's own, which never leaves the trusted side.
        chat: its chat template.
        decoding: how tokens are picked, and what ends an answer.
        capacity: how many requests may generate at a time; the caller sees to it.
    """

    def __init__(
        self,
        directory: Path | str,
        stock: int = 64,
        allow_logprobs: bool = False,
        name: str | None = None,
        drafts: str = LOOKUP,
    ) -> None:
        """Load DIR/trusted, all digests checked. Raises BundleError, also for a bundle without a tokenizer.

        Without `allow_logprobs`, requests for them are refused: they say far more about the model than its text.
        `stock` is for how many tokens pads are kept ready, once `model.slip.pool` has a source. `name` is what the
        model is called, see `naming`. `drafts` says who guesses tokens where that saves passes, see `Drafting`."""
        path = Path(directory)
        self._name = model_name(path, name)
        bundle.open_trusted(path)
        refuse_other_tasks(path)
        self.tokenizer: Any = _tokenizer(path)
        self.model: Any = self._load(path)
        self.model.slip.pool.resize(stock)
        settings = self.model.generation_config
        self._vocabulary: int = self.model.config.get_text_config().vocab_size
        self.chat = Chat(self.tokenizer, self._vocabulary)
        if self.chat.refusal is not None:
            _log.warning("this model answers plain prompts only, no chats: %s", self.chat.refusal)
        ends = end_tokens(self.tokenizer, settings.eos_token_id, self.chat, self._vocabulary)
        self.decoding = Decoding(settings, ends, self._vocabulary)
        self.model.generation_config = self.decoding.plain()  # Transformers adds its settings to every request's
        self._silent = special_tokens(self.tokenizer) | set(ends)
        self._markers = [t for t in self.tokenizer.convert_ids_to_tokens(sorted(self._silent)) if t]
        self._room = _context(self.model.config.get_text_config(), self.tokenizer)
        adapts = _keeps_positions(self.model.config.to_dict())
        self.capacity = 1 if adapts else GENERATIONS
        way = None if adapts else self._find_way()
        drafting = Drafting(drafts, self.tokenizer, self._vocabulary)
        self._batches = None if way is None else Batches(self.model, way, drafting)
        if way is None and drafts not in (LOOKUP, NONE):
            _log.warning("the draft model is of no use: this model's requests are computed one by one")
        self._allow_logprobs = allow_logprobs
        self._syntax = Once(lambda: find_syntax(self.chat.example))
        self._grammars = Once(lambda: Grammars(self.tokenizer, self.decoding.ends))

    @property
    def digest(self) -> bytes:
        return self.model.slip.digest

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return self.model.slip.shapes

    @property
    def shows(self) -> bool:
        """Whether there are open blocks."""
        return bool(self.model.slip.runs)

    def model_name(self) -> str:
        return self._name

    @property
    def syntax(self) -> Syntax:
        """How this model writes calls. Raises RequestError if it has no tools."""
        return self._syntax()

    def close(self) -> None:
        """End all answers that are computed together, and the process that tries schemas, if one runs."""
        if self._batches is not None:
            self._batches.close()
        if (grammars := self._grammars.made) is not None:
            grammars.close()

    def _constraint(self, request: GenerateRequest, prompt_tokens: int) -> Constraint | None:
        if not request.must_call and request.schema is None:
            return None
        return self._grammars().constraint(request, self.syntax if request.tools else None, prompt_tokens)

    def generate(self, request: GenerateRequest, link: Link | Router) -> Iterator[Chunk]:
        """Stream the answer to `request`, with its exchanges over `link`; together with all others that are given the
        same object, where the model allows it. Closing the iterator stops the generation; so that it can be closed, an
        empty chunk comes now and then without text.

        Raises:
            TooLongError: the prompt does not fit the model.
            RequestError: logprobs are not allowed, or it has no tools or cannot follow the schema.
            BusyError: too many schemas wait to be tried.
            LinkError, VerificationError, NumericsError: as they come. VerificationError comes even when the iterator is
            closed: a lie counts, too, when nobody waits for the text any more.
        """
        if request.logprobs is not None and not self._allow_logprobs:
            raise RequestError("logprobs are switched off by the owner of this model.")
        prompt = self._prompt(request)
        prompt_tokens = len(prompt)
        limit = min(request.max_tokens, self._room - prompt_tokens)
        if limit < 1:
            raise _too_long(request, prompt_tokens, self._room)
        constraint = self._constraint(request, prompt_tokens)
        yield Chunk("", None, prompt_tokens)
        answer = self._begin(request, prompt, limit, constraint, link)
        try:
            last = yield from self._stream(answer, request, prompt)
        finally:
            answer.cancel()
        yield last

    def _load(self, path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path).eval()

    def _find_way(self) -> Together | None:
        return find_way(self.model)

    def _begin(
        self,
        request: GenerateRequest,
        prompt: list[int],
        limit: int,
        constraint: Constraint | None,
        link: Link | Router,
    ) -> Answer:
        processors = self.decoding.processors(request, len(prompt), constraint)
        scores = None if request.logprobs is None else Scores(request.logprobs)
        if scores:
            processors.insert(0, scores)
        if self._batches is None:
            return Alone(self.model, prompt, self.decoding.plain(limit), processors, scores, link)
        cache, drafts = self._batches.way.cache(), self._batches.drafting.drafts(prompt)
        sequence = Sequence(prompt, limit, self.decoding.ends, processors, scores, cache, drafts)
        self._batches.join(sequence, link)
        return sequence

    def rehearse(self, system: str) -> None:
        """Try a chat that begins with the owner's text `system`. Raises SlipError, if none with it can be answered."""
        if self.chat.refusal is not None:
            raise SlipError(f"this model takes no chats, so none can begin with a system prompt: {self.chat.refusal}.")
        chat = [Message("system", system), Message("user", "Hello")]
        try:
            tokens = len(self.chat.tokens(chat))
            if self._has_tools():  # such chats may have a template of their own
                self.chat.tokens(chat, [Tool("example")])
        except RequestError as error:
            raise SlipError(f"no chat can begin with this system prompt: {error}") from None
        if tokens >= self._room:
            raise SlipError(
                f"the system prompt is too long: with it a chat has {tokens} tokens, of {self._room} in all."
            )

    def _has_tools(self) -> bool:
        try:
            return self.syntax is not None
        except RequestError:
            return False

    def _prompt(self, request: GenerateRequest) -> list[int]:
        if request.messages is not None:
            if request.tools or any(m.tool_calls or m.tool_call_id for m in request.messages):
                _ = self.syntax  # a template without tools would leave them out silently
            tokens = self.chat.tokens(request.messages, request.tools)
        else:
            tokens = self.tokenizer(request.prompt)["input_ids"]
        if not tokens:
            raise RequestError("the prompt is empty.")
        if strange := unknown_token(self.tokenizer, tokens, self._vocabulary):
            raise RequestError(f"the token {strange} in the prompt is none of this model's.")
        return tokens

    def _stream(self, answer: Answer, request: GenerateRequest, prompt: list[int]) -> Generator[Chunk, None, Chunk]:
        """Yield text as it becomes certain, or none; return the last chunk."""
        silent = self._silent - self.syntax.tokens(self.tokenizer) if request.tools else self._silent
        # A chat's answer is a text of its own; a plain prompt is continued.
        text = Text(self.tokenizer, silent, [] if request.prompt is None else prompt)
        stops = StopTexts([*request.stop, *self.decoding.stop], self._markers)
        logprobs = Logprobs(self.tokenizer, prompt[-1], silent)
        sent = guessed = 0

        def chunk(end: int, reason: Literal["stop", "length"] | None = None, logged: int | None = None) -> Chunk:
            """The text from `sent` to `end`, with the log-probabilities of tokens that begin before `logged`."""
            before = logprobs.before(end if logged is None else logged)
            return Chunk(text.shown[sent:end], reason, len(prompt), text.count, before, [], guessed, answer.rejected)

        for token in answer.tokens():
            if token is None:
                yield chunk(sent)
                continue
            text.push(token.id)
            guessed += token.guessed
            logprobs.push(token.id, token.scored, len(text.shown))
            if (end := stops.find(text)) is not None:
                return chunk(end, "stop")
            certain = max(sent, stops.certain(text))
            yield chunk(certain)
            sent = certain
        text.finish()
        if (end := stops.find(text)) is not None:
            return chunk(end, "stop")
        last = len(text.shown)
        if answer.ended:
            return chunk(last, "stop", last + 1)
        return chunk(max(sent, len(text.shown.rstrip(UNFINISHED))), "length", last + 1)


def _tokenizer(path: Path) -> Any:
    if not has_tokenizer(path):
        raise BundleError(f"{path} has no tokenizer, so it cannot serve text: split a model that has one.")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # Transformers raises whatever its parsers do
        first = str(error).strip().partition("\n")[0]
        raise BundleError(f"the tokenizer in {path} cannot be read ({type(error).__name__}: {first}).") from None


def _context(config: Any, tokenizer: Any) -> int:
    """The most tokens of a prompt and its answer."""
    if (room := getattr(config, "max_position_embeddings", None)) is not None:
        return room
    known = tokenizer.model_max_length  # 1e30 if unknown
    return int(known) if 1 < known <= MAX_CONTEXT else DEFAULT_CONTEXT


def _too_long(request: GenerateRequest, prompt: int, room: int) -> TooLongError:
    """In OpenAI's words: other programs look for them. An answer needs a token, however many it may have."""
    answer = 1 if request.max_tokens == MAX_TOKENS else request.max_tokens
    where = "prompt" if request.messages is None else "messages"
    return TooLongError(
        f"This model's maximum context length is {room} tokens. However, you requested {prompt + answer} tokens "
        f"({prompt} in the {where}, {answer} in the completion). Please reduce the length of the {where} or completion."
    )


def _keeps_positions(config: Any) -> bool:
    """Whether the model's rotary embedding adapts to the text at hand: concurrent generations would share it."""
    return isinstance(config, dict) and (
        config.get("rope_type") in ("dynamic", "longrope") or any(map(_keeps_positions, config.values()))
    )
