"""What an owner says to a trusted side inside vLLM: by environment variables, as vLLM's own options are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sliplm.bundle import MANIFEST
from sliplm.errors import BundleError
from sliplm.pads.sources import read_source
from sliplm.protocol.connect import Address, parse_address


@dataclass(frozen=True)
class Settings:
    """As the options of `slip trusted` of the same names.

    Attributes:
        listen: SLIP_LISTEN, where edges and helpers connect. pads: SLIP_PADS. stock: SLIP_STOCK, in tokens.
        registry: SLIP_REGISTRY, a URL.
    """

    listen: Address
    pads: str | None
    stock: int | None
    registry: str | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """Raises LinkError or BundleError for one that cannot be."""
        stock = environment.get("SLIP_STOCK") or None
        if stock is not None and not (stock.isascii() and stock.isdigit()):
            raise BundleError(f"SLIP_STOCK is a number of tokens, not {stock!a}.")
        return cls(
            parse_address(environment.get("SLIP_LISTEN") or "127.0.0.1:7411"),
            environment.get("SLIP_PADS") or None,
            None if stock is None else int(stock),
            environment.get("SLIP_REGISTRY") or None,
        )

    def check(self, directory: Path | str) -> None:
        """Raises BundleError if nobody can make pads for DIR/trusted: seen to before vLLM loads anything."""
        source = read_source(self.pads, directory)
        if isinstance(source, Path) and not (source / MANIFEST).is_file():
            raise BundleError(f"{source} is no edge bundle, so nobody makes one-time pads: see SLIP_PADS.")
