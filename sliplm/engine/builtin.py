"""Text in, text out: generation with the protected model for several requests at a time, each over its own link."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle
from sliplm import bundle
from sliplm.engine.constraint import Constraint, Grammars
from sliplm.engine.decoding import Decoding
from sliplm.engine.detokenise import UNFINISHED, Text, special_tokens
from sliplm.engine.logprobs import Logprobs, Scored, Scores
from sliplm.engine.once import Once
from sliplm.engine.stops import StopTexts, end_tokens
from sliplm.engine.template import Chat, unknown_token
from sliplm.engine.tools import Syntax, find_syntax
from sliplm.errors import BundleError, LinkError, RequestError, SlipError, TooLongError, VerificationError, locate
from sliplm.exchange.link import Field, Link, Own, States
from sliplm.naming import model_name
from sliplm.protocol.messages import MAX_TOKENS, Chunk, GenerateRequest, Message, Tool
from sliplm.split.source import refuse_other_tasks
from sliplm.split.tokenizer import has_tokenizer

GENERATIONS = 16
"""So many may run at a time; each holds a cache as long as its text."""

BEAT_SECONDS = 0.5
AHEAD = 64
"""Tokens that wait for a slow reader before the generation waits for it, too."""

MAX_CONTEXT = 1 << 20
DEFAULT_CONTEXT = 1 << 15
"""Tokens of a model that names no limit of its own."""

_log = logging.getLogger(__name__)

_Token = tuple[int, Scored | None]


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
        self, directory: Path | str, stock: int = 64, allow_logprobs: bool = False, name: str | None = None
    ) -> None:
        """Load DIR/trusted, all digests checked. Raises BundleError, also for a bundle without a tokenizer.

        Without `allow_logprobs`, requests for them are refused: they say far more about the model than its text.
        `stock` is for how many tokens pads are kept ready, once `model.slip.pool` has a source. `name` is what the
        model is called, see `naming`."""
        path = Path(directory)
        self._name = model_name(path, name)
        bundle.open_trusted(path)
        refuse_other_tasks(path)
        self.tokenizer: Any = _tokenizer(path)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
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
        self.capacity = 1 if _keeps_positions(self.model.config.to_dict()) else GENERATIONS
        self._allow_logprobs = allow_logprobs
        self._syntax = Once(lambda: find_syntax(self.chat.example))
        self._grammars = Once(lambda: Grammars(self.tokenizer, self.decoding.ends))

    @property
    def digest(self) -> bytes:
        return self.model.slip.digest

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return self.model.slip.shapes

    def model_name(self) -> str:
        return self._name

    @property
    def syntax(self) -> Syntax:
        """How this model writes calls. Raises RequestError if it has no tools."""
        return self._syntax()

    def close(self) -> None:
        """End the process that tries schemas, if one runs."""
        if (grammars := self._grammars.made) is not None:
            grammars.close()

    def _constraint(self, request: GenerateRequest, prompt_tokens: int) -> Constraint | None:
        if not request.must_call and request.schema is None:
            return None
        return self._grammars().constraint(request, self.syntax if request.tools else None, prompt_tokens)

    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        """Stream the answer to `request`, with its exchanges over `link`. Closing the iterator stops the generation;
        so that it can be closed, an empty chunk comes every half second without text.

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
        run = _Run(self, prompt, request, limit, link, constraint)
        run.start()
        try:
            last = yield from self._stream(run, request, prompt)
        finally:
            run.cancel()
        yield last

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

    def _stream(self, run: _Run, request: GenerateRequest, prompt: list[int]) -> Generator[Chunk, None, Chunk]:
        """Yield text as it becomes certain, or none; return the last chunk."""
        silent = self._silent - self.syntax.tokens(self.tokenizer) if request.tools else self._silent
        # A chat's answer is a text of its own; a plain prompt is continued.
        text = Text(self.tokenizer, silent, [] if request.prompt is None else prompt)
        stops = StopTexts([*request.stop, *self.decoding.stop], self._markers)
        logprobs = Logprobs(self.tokenizer, prompt[-1], silent)
        sent = 0
        for token in run.tokens():
            if token is None:
                yield Chunk("", None, len(prompt), text.count)
                continue
            text.push(token[0])
            logprobs.push(*token, len(text.shown))
            if (end := stops.find(text)) is not None:
                return Chunk(text.shown[sent:end], "stop", len(prompt), text.count, logprobs.before(end))
            certain = max(sent, stops.certain(text))
            yield Chunk(text.shown[sent:certain], None, len(prompt), text.count, logprobs.before(certain))
            sent = certain
        text.finish()
        if (end := stops.find(text)) is not None:
            return Chunk(text.shown[sent:end], "stop", len(prompt), text.count, logprobs.before(end))
        rest = logprobs.before(len(text.shown) + 1)
        if run.ended:
            return Chunk(text.shown[sent:], "stop", len(prompt), text.count, rest)
        return Chunk(text.shown[sent:].rstrip(UNFINISHED), "length", len(prompt), text.count, rest)


class _Run(threading.Thread):
    """`model.generate` in a thread of its own, its tokens in a queue."""

    def __init__(
        self,
        engine: BuiltinEngine,
        prompt: list[int],
        request: GenerateRequest,
        limit: int,
        link: Link,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(name="generate", daemon=True)
        self._engine, self._prompt, self._request, self._limit = engine, prompt, request, limit
        self._constraint = constraint
        self._queue: queue.Queue[_Token | BaseException | None] = queue.Queue(AHEAD)
        self._cancelled = threading.Event()
        self._link = _Cancellable(link, self._cancelled)
        self._lie: VerificationError | None = None
        self.ended = False

    def run(self) -> None:
        model = self._engine.model
        try:
            processors = self._engine.decoding.processors(self._request, len(self._prompt), self._constraint)
            scores = None if self._request.logprobs is None else Scores(self._request.logprobs)
            if scores:
                processors.insert(0, scores)
            ids = torch.tensor([self._prompt])
            with model.slip.using(self._link), torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._engine.decoding.plain(self._limit),
                    logits_processor=processors,
                    streamer=_Tokens(self._put, scores),
                    stopping_criteria=[lambda ids, _: torch.full((len(ids),), self._cancelled.is_set())],
                )
            self.ended = int(out[0, -1]) in self._engine.decoding.ends
            self._put(None)
        except SlipError as error:
            if isinstance(error, VerificationError):
                self._lie = error  # the reader may have gone, or stop before it comes to the error
            self._put(error)
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            # Its text might quote a prompt or a weight, so neither the log nor the requester gets it.
            _log.error("the generation failed: %s", locate(error))
            self._put(SlipError(f"the generation failed: {locate(error)}"))

    def _put(self, item: _Token | BaseException | None) -> None:
        """Hand `item` to the reader; wait while it has too many already, unless it has gone."""
        while not self._cancelled.is_set():
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=BEAT_SECONDS)

    def tokens(self) -> Iterator[_Token | None]:
        """The tokens, with their scores if asked for; None every half second in which there is none."""
        while True:
            try:
                item = self._queue.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def cancel(self) -> None:
        """End the thread. Raises VerificationError if the edge has lied, whether or not `tokens` came that far."""
        self._cancelled.set()
        self.join()
        if self._lie is not None:
            raise self._lie


class _Cancellable(Link):
    """`link`, until `cancelled`: a long prompt is many exchanges before the first token."""

    def __init__(self, link: Link, cancelled: threading.Event) -> None:
        self._link, self._cancelled = link, cancelled
        self.party = link.party

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        self._check()
        return self._link.exchange(group, x, own)

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        return self._link.exchanges(group, self._until_cancelled(questions), own)

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        self._check()
        return self._link.compute(run, request, start, x, keep)

    def forget(self, request: int) -> None:
        self._link.forget(request)

    def _until_cancelled(self, questions: Iterator[Field]) -> Iterator[Field]:
        for x in questions:
            self._check()
            yield x

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise LinkError("the request was cancelled")

    def close(self) -> None:
        self._link.close()


class _Tokens(BaseStreamer):
    """Pass on generated tokens; the first call brings the prompt."""

    def __init__(self, out: Callable[[_Token], None], scores: Scores | None) -> None:
        self._out, self._scores = out, scores
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            for token in value.reshape(-1).tolist():
                self._out((token, self._scores.of(token) if self._scores else None))
        self._prompt = False

    def end(self) -> None:
        """`_Run` says when it is over."""


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
