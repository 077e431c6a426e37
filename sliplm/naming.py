"""What the model is called where it is served: edges and their clients see it."""

from __future__ import annotations

import json
from pathlib import Path

from sliplm.errors import BundleError
from sliplm.protocol.frames import MAX_NAME_BYTES, NAMELESS, clean


def model_name(directory: Path, given: str | None = None) -> str:
    """`given`; or the name that the split of DIR/trusted has stored; or that of `directory`, where `trusted` has the
    name of what it is in. Never empty, and short enough for WELCOME. Raises BundleError if `given` is no name."""
    if given is not None:
        return checked_name(given)
    own = directory.resolve()
    around = own.parent.name if own.name == "trusted" else own.name
    found = (clean(name, MAX_NAME_BYTES) for name in (_stored(directory), around, own.name))
    return next(filter(None, found), NAMELESS)


def checked_name(given: str) -> str:
    """`given`, if it is a name that WELCOME can carry as it is. Raises BundleError."""
    if not given.strip() or clean(given, MAX_NAME_BYTES) != given:
        sentence = f"a model's name has 1 to {MAX_NAME_BYTES} bytes of printable text, and {given[:200]!a} has not."
        raise BundleError(sentence)
    return given


def _stored(directory: Path) -> str:
    """Empty if there is none; whether the bundle is whole is not seen to here."""
    try:
        name = json.loads((directory / "config.json").read_bytes())["quantization_config"]["name"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return name if isinstance(name, str) else ""
