"""Text in, text out: generation with the protected model for several requests at a time, each over its own link."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from sliplm import bundle
from sliplm.errors import LinkError, SlipError, VerificationError, locate
from sliplm.protocol.link import Field, Link
from sliplm.protocol.messages import MAX_TOKENS, Chunk, GenerateRequest, RequestError, TooLongError
from sliplm.trusted.constraint import Constraint, Grammars
from sliplm.trusted.logprobs import Logprobs, Scored, Scores
from sliplm.trusted.naming import model_name
from sliplm.trusted.tools import Syntax, described, find_syntax, worded

GENERATIONS = 16
"""So many may run at a time; each holds a cache as long as its text."""

BEAT_SECONDS = 0.5
AHEAD = 64
"""Tokens that wait for a slow reader before the generation waits for it, too."""

MAX_CONTEXT = 1 << 20
DEFAULT_CONTEXT = 1 << 15
"""Tokens of a model that names no limit of its own."""

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]
_Token = tuple[int, Scored | None]


class Engine:
    """A trusted bundle, loaded and ready to generate over links to its edges.

    Attributes:
        model: the Transformers model; `model.slip` is its runtime.
        tokenizer: the model's own, which never leaves the trusted side.
        capacity: how many requests may generate at a time; the caller sees to it.
    """

    def __init__(
        self, directory: Path | str, pool_depth: int = 64, allow_logprobs: bool = False, name: str | None = None
    ) -> None:
        """Load DIR/trusted, all digests checked. Raises BundleError.

        Without `allow_logprobs`, requests for them are refused: they say far more about the model than its text.
        `name` is what the model is called, see `naming`."""
        path = Path(directory)
        self._name = model_name(path, name)
        bundle.open_trusted(path)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        self.model.slip.pool.resize(pool_depth)
        self._room = _context(self.model.config.get_text_config(), self.tokenizer)
        self.capacity = 1 if _keeps_positions(self.model.config.to_dict()) else GENERATIONS
        self._allow_logprobs = allow_logprobs

    @property
    def digest(self) -> bytes:
        return self.model.slip.digest

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return self.model.slip.shapes

    def model_name(self) -> str:
        return self._name

    @cached_property
    def syntax(self) -> Syntax:
        """How this model writes calls. Raises RequestError if it has no tools."""
        return find_syntax(self.tokenizer)

    @cached_property
    def _grammars(self) -> Grammars:
        ends = self.model.generation_config.eos_token_id
        return Grammars(self.tokenizer, [ends] if isinstance(ends, int) else ends or [])

    def _constraint(self, request: GenerateRequest, prompt_tokens: int) -> Constraint | None:
        if not request.must_call and request.schema is None:
            return None
        return self._grammars.constraint(request, self.syntax if request.tools else None, prompt_tokens)

    def generate(self, request: GenerateRequest, link: Link) -> Iterator[Chunk]:
        """Stream the answer to `request`, with its exchanges over `link`. Closing the iterator stops the generation;
        so that it can be closed, an empty chunk comes every half second without text.

        Raises:
            TooLongError: the prompt does not fit the model.
            RequestError: logprobs are not allowed, or it has no tools or cannot follow the schema.
            LinkError, VerificationError, NumericsError: as they come. VerificationError comes even when the iterator is
            closed: a lie counts, too, when nobody waits for the text any more.
        """
        if request.logprobs is not None and not self._allow_logprobs:
            raise RequestError("logprobs are switched off by the owner of this model.")
        inputs = self._inputs(request)
        prompt_tokens = inputs["input_ids"].shape[1]
        limit = min(request.max_tokens, self._room - prompt_tokens)
        if limit < 1:
            raise _too_long(request, prompt_tokens, self._room)
        constraint = self._constraint(request, prompt_tokens)
        yield Chunk("", None, prompt_tokens)
        run = _Run(self, inputs, request, limit, link, constraint)
        run.start()
        try:
            last = yield from self._stream(run, request, prompt_tokens)
        finally:
            run.cancel()
        yield last

    def _inputs(self, request: GenerateRequest) -> Any:
        if request.messages is None:
            inputs = self.tokenizer(request.prompt, return_tensors="pt")
            if inputs["input_ids"].shape[1] == 0:
                raise RequestError("the prompt is empty.")
            return inputs
        if request.tools or any(m.tool_calls or m.tool_call_id for m in request.messages):
            _ = self.syntax  # a template without tools would leave them out silently
        chat, tools = worded(request.messages), described(request.tools)
        try:
            return self.tokenizer.apply_chat_template(
                chat, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates are programs of the model's author, and raise what they like
            # Only a template's own `raise_exception` speaks to users; other texts may quote the trusted side.
            why = f" ({error})" if type(error) is jinja2.TemplateError else ""
            raise RequestError(f"the model's chat template refuses these messages{why}.") from None

    def _stream(self, run: _Run, request: GenerateRequest, prompt_tokens: int) -> Generator[Chunk, None, Chunk]:
        """Yield text as it becomes certain, or none; return the last chunk."""
        stops = request.stop
        silent = set(self.tokenizer.all_special_ids)
        if request.tools:
            silent -= self.syntax.tokens(self.tokenizer)
        decoder = _Text(self.tokenizer, silent)
        logprobs = Logprobs(self.tokenizer, run.last_of_prompt)
        sent = 0
        for token in run.tokens():
            if token is None:
                yield Chunk("", None, prompt_tokens, decoder.count)
                continue
            whole = decoder.push(token[0])
            logprobs.push(*token, len(whole))
            text, stopped = _cut(whole, stops)
            if stopped:
                return Chunk(text[sent:], "stop", prompt_tokens, decoder.count, logprobs.before(len(text)))
            certain = max(sent, len(text) - _possible_stop(text, stops))
            yield Chunk(text[sent:certain], None, prompt_tokens, decoder.count, logprobs.before(certain))
            sent = certain
        whole = decoder.finish()
        text, stopped = _cut(whole, stops)
        finish: FinishReason = "stop" if stopped or run.ended else "length"
        end = len(text) if stopped else len(whole) + 1
        return Chunk(text[sent:], finish, prompt_tokens, decoder.count, logprobs.before(end))


class _Run(threading.Thread):
    """`model.generate` in a thread of its own, its tokens in a queue."""

    def __init__(
        self,
        engine: Engine,
        inputs: Any,
        request: GenerateRequest,
        limit: int,
        link: Link,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(name="generate", daemon=True)
        self._engine, self._inputs, self._request, self._limit = engine, inputs, request, limit
        self._constraint = constraint
        self._queue: queue.Queue[_Token | BaseException | None] = queue.Queue(AHEAD)
        self._cancelled = threading.Event()
        self._link = _Cancellable(link, self._cancelled)
        self._lie: VerificationError | None = None
        self.last_of_prompt = int(inputs["input_ids"][0, -1])
        self.ended = False

    def run(self) -> None:
        model = self._engine.model
        try:
            processors = _sampling(self._request, self._inputs["input_ids"].shape[1])
            if self._constraint is not None:
                processors.insert(0, self._constraint)
            scores = None if self._request.logprobs is None else Scores(self._request.logprobs)
            if scores:
                processors.insert(0, scores)
            with model.slip.using(self._link), torch.inference_mode():
                out = model.generate(
                    **self._inputs,
                    max_new_tokens=self._limit,
                    do_sample=False,
                    logits_processor=processors,
                    streamer=_Tokens(self._put, scores),
                    stopping_criteria=[lambda ids, _: torch.full((len(ids),), self._cancelled.is_set())],
                )
            ends = model.generation_config.eos_token_id
            self.ended = int(out[0, -1]) in ([ends] if isinstance(ends, int) else ends or [])
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

    def exchange(self, group: int, x: Field, meanwhile: Callable[[], None] | None = None) -> Field:
        if self._cancelled.is_set():
            raise LinkError("the request was cancelled")
        return self._link.exchange(group, x, meanwhile)

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


class _Text:
    """Token ids to text. Bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Any, silent: set[int]) -> None:
        """Tokens that are `silent` are no part of the text."""
        self._tokenizer, self._silent = tokenizer, silent
        self._ids: list[int] = []
        self.count = 0

    def push(self, token: int) -> str:
        self.count += 1
        if token not in self._silent:
            self._ids.append(token)
        return self.finish().rstrip("\ufffd")

    def finish(self) -> str:
        return self._tokenizer.decode(self._ids)


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


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _possible_stop(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a stop text."""
    longest = max((len(s) for s in stops), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def _sampling(request: GenerateRequest, prompt_tokens: int) -> transformers.LogitsProcessorList:
    """Penalties, temperature, top-k and top-p as Transformers applies them, and a draw from a generator of this
    request's own: Transformers would draw from the process-wide one, which concurrent requests share."""
    processors = transformers.LogitsProcessorList()

    def penalise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, prompt_tokens:], minlength=scores.shape[-1])
        return scores - request.frequency_penalty * counts - request.presence_penalty * (counts > 0)

    if request.frequency_penalty or request.presence_penalty:
        processors.append(penalise)
    if request.temperature == 0:
        return processors
    if request.temperature != 1:
        processors.append(transformers.TemperatureLogitsWarper(request.temperature))
    if request.top_k:
        processors.append(transformers.TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(request.top_p))
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pick = torch.multinomial(scores.float().softmax(-1), 1, generator=generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, pick, 0.0)

    processors.append(draw)
    return processors
