"""Errors in OpenAI's format: a status code and a JSON body, and never the text of an unexpected exception."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from starlette.responses import Response

from sliplm.errors import SlipError, locate

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


def translate(error: Exception) -> ApiError:
    """What the client gets to see of `error`. The log gets no more of an unexpected one than its place."""
    if isinstance(error, ApiError):
        return error
    known = error if isinstance(error, SlipError) else SlipError()
    message = str(known)
    if not known.public:
        _log.error("a request failed: %s", locate(error))
        message = "the edge failed to handle this request"
    headers = {}
    if known.status == 429:
        headers["retry-after"] = str(max(1, round(known.retry_after or RETRY_SECONDS)))
    elif not known.retry and known.status != 400:  # nobody repeats what is wrong
        # OpenAI's clients try again at every 5xx unless this header, which is theirs, says no. A refusal is not 409,
        # at which they do, too: somebody has to enrol, copy or update something first.
        headers["x-should-retry"] = "false"
    return ApiError(known.status, message, known.reason, headers=headers)
