"""The trusted side in a few lines of Python: what `slip trusted` runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sliplm.engine.builtin import BuiltinEngine
from sliplm.extras import require
from sliplm.pads.keeping import Keeping
from sliplm.pads.sources import SelfSource, find_source
from sliplm.protocol.connect import parse_address
from sliplm.registry import Limits
from sliplm.serve.limits import DEFAULTS
from sliplm.serve.rules import Rules, SystemPrompt
from sliplm.serve.server import TrustedServer


class Trusted:
    """A trusted bundle, loaded, and served to enrolled edges once `serve_forever` is called.

    Args:
        bundle: DIR/trusted.
        listen: HOST:PORT for edges; port 0 takes a free one.
        pads: who makes one-time pads, "self:DIR/edge", "helpers", or "helpers:2" for two to each pad; by default this
            process, from the edge bundle beside `bundle`.
        stock: tokens for which to keep them ready, by default 64.
        spill: a directory for those beyond 64; they stay in memory without.
        fill_between: the hours, "22:00-06:00" by the local clock, in which those beyond 64 are made.
        name: what the model is called, if not as the split or its directory says.
        allow_logprobs: whether requests may ask for log-probabilities, which help to copy a model.
        registry: URL of the device registry, if it is not the file beside the authority.
        limits: of devices without their own.
        rules: the owner's (`sliplm.serve.rules`).
        drafts: who guesses tokens, which saves passes where guesses are right: "lookup", the text itself; "none"; or
            "model:DIR", a small model with the same tokens besides.
        engine: what generates, "builtin" or "vllm", which has packages of its own (requirements-vllm.txt).

    Attributes:
        model, tokenizer: Transformers' own objects, the model's layers protected.
        engine, server: what generates, and what edges talk to.
        address: (host, port) as bound.

    Raises:
        BundleError, LinkError, IdentityError: the bundle, what is said of pads, the address, the authority or the
            registry is no good.
        SlipError: no chat can begin with the system prompt among the rules, or there are no such drafts.
    """

    def __init__(
        self,
        bundle: Path | str,
        listen: str = "127.0.0.1:0",
        pads: str | None = None,
        stock: int | None = None,
        name: str | None = None,
        *,
        spill: Path | str | None = None,
        fill_between: str | None = None,
        allow_logprobs: bool = False,
        registry: str | None = None,
        limits: Limits = DEFAULTS,
        rules: Rules | None = None,
        drafts: str = "lookup",
        engine: str = "builtin",
    ) -> None:
        host, port = parse_address(listen)
        keeping = Keeping(stock, spill, fill_between)
        kind = _engine(engine)
        made = self.engine = kind(bundle, stock=keeping.depth, allow_logprobs=allow_logprobs, name=name, drafts=drafts)
        self.model: Any = made.model
        keeping.rule(self.model.slip.pool)
        source = find_source(pads, bundle, made.digest)
        if isinstance(source, SelfSource):
            self.model.slip.make_pads(source)
        work = None if isinstance(source, SelfSource) else self.model.slip.take_helpers(source)
        self.tokenizer: Any = made.tokenizer
        if isinstance(rules, SystemPrompt):
            made.rehearse(rules.text)
        authority = Path(bundle) / "authority"
        self.server = TrustedServer(
            made,
            made.digest,
            made.shapes,
            authority,
            host,
            port,
            registry=registry,
            limits=limits,
            rules=rules,
            pads=work,
        )
        self.address = self.server.address

    def serve_forever(self) -> None:
        """Serve until `close`, which any other thread may call, or until the server has drained."""
        pool = self.model.slip.pool
        pool.start()
        try:
            self.server.serve_forever()
        finally:
            pool.close()
            self.engine.close()

    def close(self) -> None:
        self.server.close()

    def __enter__(self) -> Trusted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _engine(name: str) -> type[BuiltinEngine]:
    if name == "builtin":
        return BuiltinEngine
    # vLLM reads these as it is imported, and would write its log between our lines.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # It would tell its makers which architecture runs here, and on what: nothing leaves a trusted side unasked.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    require("vllm", "--engine vllm")
    from sliplm.engine.vllm.engine import VllmEngine

    return VllmEngine
