"""Errors in OpenAI's format: a status code and a JSON body, and never the text of an unexpected exception."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from starlette.responses import Response

from sliplm.errors import (
    BundleError,
    IdentityError,
    InternalError,
    LinkError,
    ProtocolError,
    VerificationError,
    VersionError,
    locate,
)
from sliplm.protocol.messages import BusyError, RequestError, TooLongError

_log = logging.getLogger(__name__)

RETRY_SECONDS = 2
"""What Retry-After says where nobody knows better: about the time of a short answer."""


class ApiError(Exception):
    """`status` and `message` for the client; `code` is for programs, `param` names the offending parameter."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "requests" if self.status == 429 else "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(msgspec.json.encode(self.body), self.status, self.headers, "application/json")


def busy(message: str, seconds: float = RETRY_SECONDS) -> ApiError:
    """The same request may work in a while."""
    return ApiError(429, message, "rate_limit_exceeded", headers={"retry-after": str(max(1, round(seconds)))})


def final(status: int, message: str, code: str) -> ApiError:
    """The same request fails again, so that clients that try again on their own must not: OpenAI's do it at every 5xx
    unless this header, which is theirs, says no."""
    return ApiError(status, message, code, headers={"x-should-retry": "false"})


def translate(error: Exception) -> ApiError:
    """What the client gets to see of `error`; 503 is for what passes. The log gets no more of an unexpected one than
    its place."""
    match error:
        case ApiError():
            return error
        case TooLongError():
            return ApiError(400, str(error), "context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), "invalid_request")
        case BusyError():
            return busy(str(error), error.retry_after or RETRY_SECONDS)
        case IdentityError() | BundleError() | VersionError():
            # Not 409, which OpenAI's clients try again: somebody has to enrol, copy or update something first.
            return final(403, str(error), "refused")
        case VerificationError():
            return final(502, str(error), "verification_failed")
        case ProtocolError():
            return final(502, str(error), "protocol_error")
        case LinkError():
            return ApiError(503, str(error), "trusted_unavailable")
        case InternalError():
            return final(500, str(error), "internal_error")
        case _:
            _log.error("a request failed: %s", locate(error))
            return final(500, "the edge failed to handle this request", "internal_error")
