"""All answers over one link are generated together: a pass of the model for all, then each picks its next token, or, as
far as it had guessed what follows, several.

They join and leave between passes. Prompts are computed in pieces beside the tokens of those that are further on, who
therefore never wait long. An answer whose reader is slow is left out until the reader has caught up.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from sliplm.engine.answer import cancellable
from sliplm.engine.drafting import Drafting
from sliplm.engine.drafts import Pace
from sliplm.engine.sequence import Sequence
from sliplm.errors import CancelledError, LinkError
from sliplm.exchange.link import Link, Router
from sliplm.trusted.packed import Part
from sliplm.trusted.together import Together

ROWS = 128
"""Tokens of a pass while others wait for their next one: as many as one exchange carries."""

GUESSES = 10
"""Tokens of a draft, at most: longer ones are seldom right to their end."""

ROWS_ALONE = 512
"""Tokens of a pass of prompts only: the edge multiplies while the trusted side encodes and decodes."""


class Batches:
    """The batches of a model, one for every link in use.

    Attributes:
        model: the protected model.
        way: how it computes several sequences.
        drafting: who guesses tokens.
        pace: how long passes take.
        lock: held where sequences join, and where a batch decides that it is over.
        running: the batches, by the `id` of their link.
    """

    def __init__(self, model: Any, way: Together, drafting: Drafting) -> None:
        self.model, self.way, self.drafting, self.pace = model, way, drafting, Pace()
        self.lock = threading.Lock()
        self.running: dict[int, Batch] = {}

    def join(self, sequence: Sequence, link: Link | Router) -> None:
        """Generate `sequence` from now on, together with all others over `link`."""
        with self.lock:
            batch = self.running.get(id(link))  # which holds the link, so there is no other one of that number
            if batch is not None:
                batch.take(sequence)
                return
            batch = Batch(self, link)
            batch.take(sequence)
            batch.start()  # which may fail
            self.running[id(link)] = batch

    def close(self) -> None:
        """End all answers. Returns when no thread is left."""
        with self.lock:
            running = list(self.running.values())
        for batch in running:
            batch.end()


class Batch(threading.Thread):
    """The answers over one link, and the thread that generates them. It ends when none is left."""

    def __init__(self, batches: Batches, link: Link | Router) -> None:
        super().__init__(name="generate", daemon=True)
        self._batches, self._key, self._link = batches, id(link), cancellable(link, self._unwanted)
        self._wake = threading.Event()
        self._joining: list[Sequence] = []
        self._sequences: list[Sequence] = []
        self._passing: list[Sequence] = []
        self._over = self._ending = False

    def take(self, sequence: Sequence) -> None:
        """Called under the lock of `batches`, which also decides whether the batch is over."""
        sequence.batch, sequence.wake = self, self._wake
        self._joining.append(sequence)
        self._wake.set()

    def wait_if_over(self) -> None:
        """Return at once, or, if no answer is left, when the thread has ended."""
        if self._over:
            self.join()

    def end(self) -> None:
        """End all answers and the thread."""
        self._ending = True
        self._wake.set()
        self.join()

    def run(self) -> None:
        with self._batches.model.slip.using(self._link), torch.inference_mode():
            while self._gather():
                ready = [s for s in self._sequences if not s.full]
                if not ready:
                    self._wake.wait()
                    continue
                try:
                    self._step(ready)
                except BaseException as error:  # nobody may wait for ever
                    for sequence in ready:
                        sequence.fail(error)

    def _gather(self) -> bool:
        """Let sequences join and leave; whether any is left."""
        self._wake.clear()
        with self._batches.lock:
            self._sequences += self._joining
            self._joining.clear()
            if self._ending:
                for sequence in self._sequences:
                    sequence.fail(LinkError("the trusted side is shutting down"))
            leaving = [s for s in self._sequences if s.over or s.cancelled.is_set()]
            self._sequences = [s for s in self._sequences if s not in leaving]
            if not self._sequences:
                self._over = True
                del self._batches.running[self._key]
        for sequence in leaving:
            sequence.left.set()
        return not self._over

    def _step(self, sequences: list[Sequence], guess: bool = True) -> None:
        """A pass for `sequences`, or as many as one has room for. An error ends those that it concerns."""
        parts = {s: part for s, part in self._shares(sequences, guess) if part.tokens}
        self._passing = list(parts)
        decoding = all(sequence.begun for sequence in parts)
        begin = time.perf_counter()
        try:
            logits = self._batches.way.forward(list(parts.values()))
        except CancelledError:
            return  # all of them have been
        except LinkError as error:  # the edge's fault, so it concerns all
            for sequence in parts:
                sequence.fail(copy.copy(error))
        except Exception as error:
            if len(parts) == 1 and not guess:
                self._passing[0].fail(error)
            else:
                for sequence in parts:  # whom it concerns shows when each has a pass of its own, without guesses
                    self._step([sequence], guess=False)
        else:
            if decoding:
                rows = sum(len(part.tokens) for part in parts.values())
                self._batches.pace.learn(rows, time.perf_counter() - begin)
            said = logits.split([part.wanted for part in parts.values()])
            for (sequence, part), wanted in zip(parts.items(), said, strict=True):
                try:
                    sequence.seen(part, wanted)
                except Exception as error:
                    sequence.fail(error)

    def _unwanted(self) -> bool:
        return self._ending or all(s.cancelled.is_set() for s in self._passing)

    def _shares(self, sequences: list[Sequence], guess: bool) -> Iterator[tuple[Sequence, Part]]:
        """What each brings to the next pass: those that have begun all they have, which is a token, and guesses of what
        follows it while no prompt waits; prompts share the room that is left evenly, so that a short one need not wait
        for a long one."""
        begun = [s for s in sequences if s.begun]
        prompts = sorted((s for s in sequences if not s.begun), key=lambda s: s.pending)
        guessing = guess and not prompts and (self._batches.way.ragged or len(begun) == 1)
        pace, most = self._batches.pace, min(1 + GUESSES, ROWS // max(1, len(begun)))
        price = pace.price(len(begun)) if guessing and most > 1 else 1.0
        model_price = self._batches.drafting.seconds * len(begun) / pace.seconds if pace.seconds else 0.0
        for sequence in begun:
            yield sequence, sequence.part(max(1, most), price, model_price)
        room = max(1, ROWS - len(begun)) if begun else ROWS_ALONE
        for i, sequence in enumerate(prompts):
            part = sequence.part(room // (len(prompts) - i))
            room -= len(part.tokens)
            yield sequence, part
