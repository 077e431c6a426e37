"""Who may ask: requests for this API's own names only, and with its key if it has one."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sliplm.edge.api.errors import ApiError
from sliplm.errors import IdentityError

OPEN = ("/", "/healthz", "/readyz")
"""Paths that need no key: the chat page, which asks for one, and what tells no more than "up" or "not up"."""

MAX_KEY_BYTES = 4096


class OwnNamesOnly:
    """Refuses requests that were made for another name than this API's. Somebody's web page can let its own name
    point to this machine (DNS rebinding); the browser then takes the API for a part of that page, but still says
    in Host, and mostly in Origin, where it thinks it is. An address cannot be pointed elsewhere. `given` are names
    that the API has besides, from `read_name`: of a proxy before it, or of its container. Pages of `origins`, from
    `read_origin`, may ask, too."""

    def __init__(self, app: ASGIApp, host: str, given: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._given = frozenset(given)
        self._names = {_plain(host), "localhost", "127.0.0.1", "::1"} | self._given
        address = _address(host)
        self._any_address = address is not None and address.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._refusal(Headers(scope=scope))):
            await ApiError(403, why, "forbidden").response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host = headers.get("host", "").lower()
        name = _name(host)
        if name not in self._names and not (self._any_address and _address(name)):
            return "this API does not go by the name in the Host header: use its address, or start it with --api-name"
        if (origin := headers.get("origin")) is not None and origin not in self._origins:
            scheme, _, authority = origin.lower().partition("://")  # a proxy may have added TLS, or changed Host
            if scheme not in ("http", "https") or (authority != host and _name(authority) not in self._given):
                return "this API does not serve other web pages but those that it was started with --api-origin for"
        return None


class KeyOnly:
    """Refuses requests without `Authorization: Bearer KEY`, except for the OPEN paths."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._has_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this API needs its key: send it as Authorization: Bearer KEY",
            "invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)


def read_name(text: str) -> str:
    """The name in `text`, as the Host header has it before its port: names are answered on every port. Raises
    IdentityError for what would never match."""
    name = _plain(text.strip().removeprefix("[").removesuffix("]"))
    # No name ends in a number, or a browser takes it for an address; and it writes other letters than these as xn--.
    if _address(name) is None and not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z0-9_-]*[a-z_-][a-z0-9_-]*", name):
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


def _name(authority: str) -> str:
    """The host of an authority, which may have a port."""
    return _plain(re.sub(r":\d*$", "", authority).removeprefix("[").removesuffix("]"))


def _plain(name: str) -> str:
    """The one spelling of a name or an address, of which there are several."""
    name = name.lower().removesuffix(".")
    address = _address(name)
    return name if address is None else str(address)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
