"""Who may ask: requests for this API's own names only, and with its key if it has one."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sliplm.edge.api.errors import ApiError
from sliplm.edge.options import address, named, plain

OPEN = ("/", "/healthz", "/readyz")
"""Paths that need no key: the chat page, which asks for one, and what tells no more than "up" or "not up"."""


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
        self._names = {plain(host), "localhost", "127.0.0.1", "::1"} | self._given
        own = address(host)
        self._any_address = own is not None and own.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._refusal(Headers(scope=scope))):
            await ApiError(403, why, "forbidden").response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host = headers.get("host", "").lower()
        name = named(host)
        if name not in self._names and not (self._any_address and address(name)):
            return "this API does not go by the name in the Host header: use its address, or start it with --api-name"
        if (origin := headers.get("origin")) is not None and origin not in self._origins:
            scheme, _, authority = origin.lower().partition("://")  # a proxy may have added TLS, or changed Host
            if scheme not in ("http", "https") or (authority != host and named(authority) not in self._given):
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
