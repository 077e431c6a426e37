"""The trusted side in a few lines of Python: what `slip trusted` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sliplm.engine.builtin import BuiltinEngine
from sliplm.pads.sources import find_source
from sliplm.protocol.channel import parse_address
from sliplm.serve.server import TrustedServer


class Trusted:
    """A trusted bundle, loaded, and served to enrolled edges once `serve_forever` is called.

    Args:
        bundle: DIR/trusted.
        listen: HOST:PORT for edges; port 0 takes a free one.
        pads: who makes one-time pads, "self:DIR/edge"; by default this process, from the edge bundle beside `bundle`.
        stock: tokens for which to keep them ready.
        name: what the model is called, if not as the split or its directory says.

    Attributes:
        model, tokenizer: Transformers' own objects, the model's layers protected.
        address: (host, port) as bound.

    Raises:
        BundleError, LinkError, IdentityError: the bundle, the address or the authority is no good.
    """

    def __init__(
        self,
        bundle: Path | str,
        listen: str = "127.0.0.1:0",
        pads: str | None = None,
        stock: int = 64,
        name: str | None = None,
    ) -> None:
        host, port = parse_address(listen)
        self._engine = BuiltinEngine(bundle, stock, name=name)
        self.model: Any = self._engine.model
        self.model.slip.pool.source = find_source(pads, bundle, self._engine.digest)
        self.tokenizer: Any = self._engine.tokenizer
        authority = Path(bundle) / "authority"
        self._server = TrustedServer(self._engine, self._engine.digest, self._engine.shapes, authority, host, port)
        self.address = self._server.address

    def serve_forever(self) -> None:
        """Serve until `close`, which any other thread may call."""
        pool = self.model.slip.pool
        pool.start()
        try:
            self._server.serve_forever()
        finally:
            pool.close()
            self._engine.close()

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> Trusted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
