"""What the edge's operator says of its API, read and checked: its key, its names, the pages that may ask."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from sliplm.errors import IdentityError

MAX_KEY_BYTES = 4096


def read_name(text: str) -> str:
    """The name in `text`, as the Host header has it before its port: names are answered on every port. Raises
    IdentityError for what would never match."""
    name = plain(text.strip().removeprefix("[").removesuffix("]"))
    # No name ends in a number, or a browser takes it for an address; and it writes other letters than these as xn--.
    if address(name) is None and not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z0-9_-]*[a-z_-][a-z0-9_-]*", name):
        raise IdentityError(
            f"{text[:200]!a} is not a name of this API: write it as slip.example.com, without scheme, port or path."
        )
    return name


def read_origin(text: str) -> str:
    """The origin in `text`, as browsers send it: scheme, host, and a port that is not the scheme's own. Raises
    IdentityError; there is no sign for all pages, since those of strangers are some of them."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?/?", text.strip().lower())
    if not found:
        raise IdentityError(f"{text[:200]!a} is not the origin of a web page, such as https://app.example.com.")
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + ("" if (scheme, port) in (("http", ":80"), ("https", ":443")) else port or "")


def read_key(path: Path) -> str:
    """The API key in a file: one line of printable ASCII without spaces. Raises IdentityError."""
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES + 1).strip().decode("ascii", "replace")
    except OSError as error:
        raise IdentityError(f"cannot read the API key in {path}: {error.strerror or error}.") from None
    if not 1 <= len(key) <= MAX_KEY_BYTES or not all("!" <= c <= "~" for c in key):
        raise IdentityError(f"{path} does not hold an API key: one line of printable characters without spaces.")
    return key


def named(authority: str) -> str:
    """The host of an authority, which may have a port."""
    return plain(re.sub(r":\d*$", "", authority).removeprefix("[").removesuffix("]"))


def plain(name: str) -> str:
    """The one spelling of a name or an address, of which there are several."""
    name = name.lower().removesuffix(".")
    found = address(name)
    return name if found is None else str(found)


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
