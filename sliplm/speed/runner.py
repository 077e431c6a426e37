"""One process that `slip bench` measures: the unprotected model, or the trusted side with its edge in another process.

Commands come as lines of JSON on stdin, answers leave on stdout:

    {"do": "decode", "tokens": n, "streams": 1, ...} -> {"seconds": [per step], "spent": {"cpu": seconds per step, ...}}
    {"do": "stock", "tokens": n, "streams": 1} -> {"cpu": seconds per token}, of the pads that such a `decode` takes
    {"do": "prefill", "tokens": n, ...} -> {"seconds": s, ...}
    {"do": "memory"} -> {"processes": [{"now": bytes, "anonymous": bytes, "peak": bytes}, ...]}
    {"do": "loaded"} -> {"seconds": to load the model, "parameters": of it}

What is timed is `model.generate` and `model.__call__` of Transformers; of the protected model, the passes that the
engine makes for its requests. Tokens are the likeliest ones. A decoding step is the time from one token of every stream
to the next, so the first one, with the prompt, is apart.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle
from sliplm.processes import cpu_seconds, memory, process
from sliplm.protocol.remote import RemoteLink
from sliplm.registry import authority
from sliplm.serve.server import TrustedServer
from sliplm.speed.cores import on
from sliplm.split.source import load_whole
from sliplm.trusted.packed import Part
from sliplm.trusted.together import find_way

PROMPT = 8


def prompts(streams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (streams, longest), of PROMPT tokens and up to twice as many, filled up on the left."""
    lengths = PROMPT + torch.arange(streams)[:, None] % PROMPT
    places = torch.arange(int(lengths.max()))
    ids = (places + 7 * torch.arange(streams)[:, None]) % 200 + 3
    return ids, (places >= len(places) - lengths).long()


class _Clock(BaseStreamer):
    """Notes when each token comes (the first call brings the prompt), and what `sample` gives at the first and last."""

    def __init__(self, sample: Callable[[], dict[str, Any]]) -> None:
        self._sample = sample
        self.times: list[float] = []
        self.samples: list[dict[str, Any]] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.samples.append(self._sample())

    def end(self) -> None:
        self.samples.append(self._sample())


class Plain:
    """The unprotected model, as Transformers runs it."""

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        self.model: Any = self._timed(lambda: load_whole(source).to(dtype))
        self.others: list[int] = []

    def _timed(self, load: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        model = load()
        self._load_seconds = time.perf_counter() - begin
        return model

    def loaded(self, **_: Any) -> dict[str, float]:
        return {
            "seconds": self._load_seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def decode(self, tokens: int, streams: int = 1, **_: Any) -> dict[str, Any]:
        clock = _Clock(self._sample)
        with torch.inference_mode():
            self._generate(*prompts(streams), tokens, clock)
        steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        first, last = clock.samples
        return {"seconds": steps, "spent": {key: (last[key] - first[key]) / len(steps) for key in last}}

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, clock: _Clock) -> None:
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )

    def _sample(self) -> dict[str, float]:
        return {"cpu": time.process_time()}

    def prefill(self, tokens: int, **_: Any) -> dict[str, Any]:
        ids = (torch.arange(tokens)[None] * 7919) % self.model.config.vocab_size
        with torch.inference_mode():
            before = self._sample()
            begin = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - begin
            return {"seconds": seconds, "spent": {key: value - before[key] for key, value in self._sample().items()}}

    def memory(self, **_: Any) -> dict[str, Any]:
        return {"processes": [memory(pid) for pid in (os.getpid(), *self.others)]}


class _NoText:
    """The server's engine: edges connect, and no one asks for text."""

    capacity = 1
    shows = False
    syntax: Any = None

    def generate(self, request: Any, link: Any) -> Any:
        raise NotImplementedError

    def model_name(self) -> str:
        return "bench"


class Protected(Plain):
    """The trusted side in this process, and a real `slip edge` in another, which has the cores `others`, if named.

    `pads` says who makes them: "self", this process, which then is an edge, too; or "helpers", a real `slip helper` in
    a third process. `clocks` count the steps of an exchange, and cost some time of their own. The others reach this
    process by the address that `way` gives for its own.
    """

    def __init__(
        self,
        directory: Path,
        running: ExitStack,
        pads: str = "self",
        clocks: bool = True,
        others: Collection[int] = (),
        way: Callable[[str], str] = str,
    ) -> None:
        trusted = directory / "trusted"
        self.model = self._timed(lambda: transformers.AutoModelForCausalLM.from_pretrained(trusted).eval())
        self._slip = self.model.slip
        self._way = find_way(self.model)
        self._spent = self._slip.measure() if clocks else {}
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="slip-bench-")))
        authority.add_device(scratch / "authority", "bench", scratch / "identity", days=1)
        work = self._slip.take_helpers() if pads == "helpers" else None
        server = TrustedServer(_NoText(), self._slip.digest, self._slip.shapes, scratch / "authority", pads=work)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.callback(server.close)
        where = way("{}:{}".format(*server.address))
        common = (directory / "edge", "--trusted", where, "--identity")
        with on(others):
            edge = running.enter_context(process("edge", *common, scratch / "identity", "--api", ""))
        while not server.links():  # the edge knows a moment before the server does
            time.sleep(0.01)
        self._link: RemoteLink = server.links()[0]
        self.others = [edge["pid"]]
        if pads == "helpers":
            authority.add_device(scratch / "authority", "helper", scratch / "helper", days=1, edge=False, helper=True)
            with on(others):
                helper = running.enter_context(process("helper", *common, scratch / "helper"))
            self.others.append(helper["pid"])
        else:
            self._slip.attach(directory / "edge")
        running.callback(self._slip.pool.close)

    def decode(self, tokens: int, streams: int = 1, link: str = "tls", pads: str = "ready", **_: Any) -> dict[str, Any]:
        pool = self._slip.pool
        needed = prompts(streams)[0].numel() + streams * tokens
        self._fill(needed)
        if pads == "ready":
            pool.resize(0)
        with self._slip.using(self._link if link == "tls" else self._slip.default_link):
            result = super().decode(tokens, streams)
        if pads == "made":  # on the same cores, meanwhile and afterwards, until all that were used are replaced
            begin = time.perf_counter()
            pool.wait(needed)
            waited = time.perf_counter() - begin  # the prompt's pads are in it, too
            result["with_pads"] = (sum(result["seconds"]) + waited) / len(result["seconds"])
        return result

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, clock: _Clock) -> None:
        if self._way is None:
            return super()._generate(ids, mask, tokens, clock)
        texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        parts = [Part(self._way.cache(), 0, text, 1) for text in texts]
        clock.put(ids)
        for _ in range(tokens):
            picked = self._way.forward(parts).numpy().argmax(1)  # as the engine does
            clock.put(picked)
            parts = [
                Part(part.cache, part.start + len(part.tokens), [token], 1)
                for part, token in zip(parts, picked.tolist(), strict=True)
            ]
        clock.end()

    def stock(self, tokens: int, streams: int, **_: Any) -> dict[str, float]:
        """Make pads while nothing else is done. Groups differ in what earlier prompts left of them; as long as those
        had no more streams, the pads of this prompt even that out, and those of all tokens that follow are counted."""
        prompt = prompts(streams)[0].numel()
        self._fill(prompt)
        begin = time.process_time()
        self._fill(prompt + streams * tokens)
        return {"cpu": (time.process_time() - begin) / (streams * tokens)}

    def prefill(self, tokens: int, link: str = "tls", **_: Any) -> dict[str, Any]:
        self._fill(tokens)
        self._slip.pool.resize(0)
        with self._slip.using(self._link if link == "tls" else self._slip.default_link):
            return super().prefill(tokens)

    def _fill(self, tokens: int) -> None:
        pool = self._slip.pool
        if not self._slip.operators:  # nothing is masked, so there are no pads to wait for
            return
        pool.resize(tokens)
        pool.start()
        pool.wait(tokens)

    def _sample(self) -> dict[str, float]:
        counters = self._slip.counters
        return (
            super()._sample()
            | {"edge_cpu": cpu_seconds(self.others[0])}
            | {"exchanges": counters.exchanges}
            | self._spent
            | {name: getattr(self._link, name) for name in ("sending", "waiting", "receiving")}
        )


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not get among the answers
    kind, source = sys.argv[1:3]
    options = json.loads(sys.argv[3])
    with ExitStack() as running:
        protected = kind == "protected"
        runner = Protected(Path(source), running, **options) if protected else Plain(source, getattr(torch, kind))
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(runner, command.pop("do"))(**command)
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
