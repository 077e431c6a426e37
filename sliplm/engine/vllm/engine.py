"""`slip trusted --engine vllm`: vLLM computes the answers of all requests together, in this process.

vLLM has the model, its cache and the schedule. Which token comes next is for the same code to decide as with the
built-in engine, which reads the logits of each answer: so are the templates, texts, calls and schemas.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import transformers
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from sliplm.engine.answer import Answer, Token
from sliplm.engine.builtin import BuiltinEngine
from sliplm.engine.constraint import Constraint
from sliplm.engine.drafting import LOOKUP, NONE
from sliplm.engine.logprobs import Scores
from sliplm.engine.vllm.edges import AGAIN_SECONDS, making
from sliplm.errors import LinkError, SlipError
from sliplm.exchange.link import Link, Router
from sliplm.protocol.messages import GenerateRequest
from sliplm.trusted.runtime import Runtime

GENERATIONS = 64
"""So many requests run at a time."""

CACHE_GIB = "4"
"""For keys and values, if VLLM_CPU_KVCACHE_SPACE does not say."""

T = TypeVar("T")


class VllmEngine(BuiltinEngine):
    """A trusted bundle, loaded into vLLM. See BuiltinEngine, whose attributes it has; `model` holds the runtime."""

    def _load(self, path: Path) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the links are in this process
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
        self._steps = steps = Steps()
        arguments = EngineArgs(
            model=str(path),
            skip_tokenizer_init=True,
            max_num_seqs=GENERATIONS,
            async_scheduling=False,
            disable_log_stats=True,
            logits_processors=[_Picks],
        )
        token = making.set(steps.take)
        try:
            steps.start(LLMEngine.from_engine_args(arguments))
        finally:
            making.reset(token)
        config = transformers.AutoConfig.from_pretrained(path)
        settings = transformers.GenerationConfig.from_pretrained(path)
        return SimpleNamespace(slip=steps.runtime, config=config, generation_config=settings)

    def __init__(self, directory: Path | str, *, drafts: str = NONE, **options: Any) -> None:
        """As BuiltinEngine. Raises SlipError also for a draft model; nobody guesses here."""
        if drafts not in (LOOKUP, NONE):
            raise SlipError("no model guesses tokens with --engine vllm: leave --drafts out.")
        super().__init__(directory, drafts=NONE, **options)
        self.capacity = GENERATIONS

    def _find_way(self) -> None:
        """vLLM's own."""

    def _begin(
        self,
        request: GenerateRequest,
        prompt: list[int],
        limit: int,
        constraint: Constraint | None,
        link: Link | Router,
    ) -> Answer:
        scores = None if request.logprobs is None else Scores(request.logprobs)
        first = [] if scores is None else [scores]
        answer = _Answer(
            prompt,
            limit,
            self.decoding.ends,
            lambda: [*first, *self.decoding.processors(request, len(prompt), constraint)],
            scores,
            link,
            self._steps.drop,
        )
        self._steps.join(answer)
        return answer

    def close(self) -> None:
        self._steps.close()
        super().close()


class _Answer(Answer):
    """Attributes:
    gone: set when nothing is computed for it any more.
    over: whether it has failed.
    """

    _numbers = count()

    def __init__(
        self,
        prompt: list[int],
        limit: int,
        ends: list[int],
        make: Callable[[], list[Any]],
        scores: Scores | None,
        link: Link | Router,
        drop: Callable[[_Answer], None],
    ) -> None:
        super().__init__()
        self.name = str(next(self._numbers))
        self.prompt, self.limit, self.ends, self.scores, self.link = prompt, limit, ends, scores, link
        self.gone, self.over = threading.Event(), False
        self._make, self._drop = make, drop
        self._processors: list[Any] = []
        _answers[self.name] = self

    def pick(self, said: list[int], logits: torch.Tensor) -> torch.Tensor:
        """The logits (V) after the tokens that it has `said`, so that the largest is the next token's."""
        if not said:  # vLLM asks after each piece of a prompt: a draw of its own begins with the last
            self._processors = self._make()
        ids, row = torch.tensor([[*self.prompt, *said]]), logits[None]
        try:
            for process in self._processors:
                row = process(ids, row)
        except Exception as error:  # of this answer's: others are in the same step
            self.fail(error)
            return logits
        return row[0]

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            super().fail(error)
            self._drop(self)

    def _wait(self) -> None:
        self._drop(self)
        self.gone.wait()


_answers: WeakValueDictionary[str, _Answer] = WeakValueDictionary()


class _Picks(AdapterLogitsProcessor):  # type: ignore[misc]
    """Lets answers pick their tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[..., torch.Tensor] | None:
        answer = _answers.get((params.extra_args or {}).get("slip", ""))
        return None if answer is None else answer.pick


class Steps:
    """Steps vLLM's engine as long as there are answers, and brings their exchanges to their edges."""

    runtime: Runtime

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._answers: dict[str, _Answer] = {}
        self._inside: dict[str, str] = {}  # vLLM's own names of those that it has
        self._llm: Any = None

    def take(self, _: Path, runtime: Runtime) -> Steps:
        """What vLLM's layers are given (`edges.making`)."""
        self.runtime = runtime
        return self

    def start(self, llm: Any) -> None:
        self._llm = llm
        threading.Thread(target=self._step, name="vllm steps", daemon=True).start()

    def close(self) -> None:
        self._orders.put(None)

    def join(self, answer: _Answer) -> None:
        """Begin an answer with the next step. Its edge may compute from now on."""
        with self._lock:
            self._answers[answer.name] = answer
        self._orders.put(lambda: self._add(answer))

    def drop(self, answer: _Answer) -> None:
        """End an answer before the next step."""
        self._orders.put(lambda: self._end(answer))

    def run(self, compute: Callable[[], T]) -> T:
        """See Runs. Without an edge, all answers fail with that."""
        while True:
            with self._lock:
                link = next((a.link for a in self._answers.values() if not a.over), None)
            if link is None:
                for answer in self._known():  # nobody computes anything for them any more
                    answer.gone.set()
                time.sleep(AGAIN_SECONDS)
                continue
            try:
                with self.runtime.using(link):
                    return compute()
            except LinkError as error:
                for answer in self._known():
                    if answer.link is link:
                        answer.fail(error)

    def _known(self) -> list[_Answer]:
        with self._lock:
            return list(self._answers.values())

    def _step(self) -> None:
        while True:
            try:
                order = self._orders.get(block=not self._inside)
                if order is None:
                    return
                order()
                continue
            except queue.Empty:
                pass
            try:
                for out in self._llm.step():
                    self._pass_on(out)
            except Exception as error:  # vLLM cannot go on with what it has begun
                for answer in self._known():
                    answer.fail(error)

    def _add(self, answer: _Answer) -> None:
        if answer.cancelled.is_set() or answer.over:
            return
        settings = SamplingParams(
            temperature=0,
            max_tokens=answer.limit,
            stop_token_ids=answer.ends,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"slip": answer.name},
        )
        try:
            prompt = {"prompt_token_ids": answer.prompt}
            self._inside[answer.name] = self._llm.add_request(answer.name, prompt, settings)
        except Exception as error:
            answer.fail(error)

    def _end(self, answer: _Answer) -> None:
        if (name := self._inside.pop(answer.name, None)) is not None:
            self._llm.abort_request([name], internal=True)
        self._forget(answer)

    def _forget(self, answer: _Answer) -> None:
        with self._lock:
            self._answers.pop(answer.name, None)
        answer.gone.set()

    def _pass_on(self, out: Any) -> None:
        answer = self._answers.get(out.request_id)
        if answer is None or answer.over:
            return
        (said,) = out.outputs
        for token in said.token_ids:
            answer.put(Token(token, answer.scores.of(token) if answer.scores else None))
            answer.ended = token in answer.ends
        if out.finished:
            answer.finish()
            self._inside.pop(answer.name, None)
            self._forget(answer)
