"""What can go wrong, each as one sentence a person can act on. The command line prints it and nothing else.

Every class knows what becomes of it: on the wire (`docs/protocol.md`), in the edge's API and in the usage records
(`docs/operations.md`). Whoever sends, answers or counts an error asks it, and need not know which one it is.
"""

from __future__ import annotations

import enum
import traceback
from pathlib import Path
from typing import ClassVar


class Code(enum.IntEnum):
    """Why an ERROR was sent, for the program; its payload is the sentence for the person."""

    FAILED = 0  # try again if you like
    VERSION = 1  # no common protocol version: final
    IDENTITY = 2  # not enrolled, suspended, revoked or expired: final
    BUNDLE = 3  # the bundle belongs to another split: final
    BUSY = 4  # too many connections or requests: try again later
    REQUEST = 5  # the request itself is wrong
    NO_WORKER = 6  # no worker is connected
    UNVERIFIED = 7  # an answer of the only edge failed its check
    LIMITED = 8  # the device used up its tokens a minute or a day: try again later
    REFUSED = 9  # the owner's rules refuse the request or its answer
    TOO_LONG = 10  # the prompt leaves no room for an answer
    INTERNAL = 11  # something inside the trusted side is broken


class SlipError(Exception):
    """Base of every error this package raises on purpose. Its text never holds a secret.

    Attributes:
        code: what an ERROR frame says that stands for it.
        told: the sentence in that frame, where the text is for the trusted side alone; empty for the text.
        status, reason: of the API's answer: HTTP's status and the code for programs.
        public: whether that answer has the text. If not, it says that the edge failed.
        retry: whether the same request may work later.
        retry_after: after so many seconds, if that is known.
        outcome: of the request in metrics and usage records.

    Nobody but the operator learns of an error that says nothing else: its text may name an activation, a layer or a
    rule.
    """

    code: ClassVar[Code] = Code.INTERNAL
    told: ClassVar[str] = "generation failed on the trusted side; its log says why"
    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal_error"
    public: ClassVar[bool] = False
    retry: ClassVar[bool] = False
    outcome: ClassVar[str] = "failed"
    retry_after: int | None = None


class InternalError(SlipError):
    """Something inside the trusted side is broken, so the same request would fail again. The text is the same whatever
    it is; the log there says more."""

    public = True


class UnsupportedModelError(SlipError):
    """The model cannot be read, or has layers that cannot be protected; the text names them."""


class NumericsError(SlipError):
    """An activation is not a finite number; the text names the layer."""


class RulesError(SlipError):
    """The owner's rules cannot be loaded, or failed. The text is the operator's."""


class BundleError(SlipError):
    """A bundle is missing, damaged, of another version, or does not fit. The text may name its files."""

    status, reason, public = 403, "refused", True


class MismatchError(BundleError):
    """The bundles of the two sides come from different splits."""

    code, told = Code.BUNDLE, ""


class IdentityError(SlipError):
    """A certificate or an identity file is missing, malformed, expired, or not enrolled."""

    code, told = Code.IDENTITY, ""
    status, reason, public = 403, "refused", True


class HandshakeError(IdentityError):
    """The TLS handshake failed over a certificate, or so it seems: anybody on the way can make it seem so."""


class RegistryError(IdentityError):
    """The registry cannot be used just now, which says nothing about any device. The text is the operator's: it
    names a path or a host."""

    code, told = Code.FAILED, "the trusted side cannot look this device up: try again later"
    status, reason, public, retry = 503, "trusted_unavailable", False, True


class LinkError(SlipError):
    """The other side is unreachable, went away, or did not answer in time."""

    code, told = Code.FAILED, ""
    status, reason, public, retry = 503, "trusted_unavailable", True, True
    outcome = "interrupted"


class CancelledError(LinkError):
    """Nobody waits any more for what this exchange is for."""


class ProtocolError(LinkError):
    """The other side sent something the protocol does not allow."""

    status, reason, retry = 502, "protocol_error", False


class VersionError(ProtocolError):
    """The two sides have no version of the protocol in common, or one of them speaks another protocol."""

    code = Code.VERSION
    status, reason = 403, "refused"


class VerificationError(LinkError):
    """An answer of the edge failed its check (Freivalds). Nothing computed from it is ever returned."""

    code, told = Code.UNVERIFIED, "an answer of the edge failed its check, so generation stopped"
    status, reason, retry = 502, "verification_failed", False
    outcome = "unverified"


class NoWorkerError(LinkError):
    """There is no WORK connection."""

    code = Code.NO_WORKER


class BusyError(LinkError):
    """Too much is going on at the trusted side: the same request may work later, after `retry_after` seconds if that
    is known."""

    code = Code.BUSY
    status, reason = 429, "rate_limit_exceeded"
    outcome = "busy"

    def __init__(self, sentence: str, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class LimitError(BusyError):
    """This device has used up what it may use in a minute or a day."""

    code = Code.LIMITED
    outcome = "limited"


class RequestError(SlipError):
    """The request asks for something that is malformed or that this model cannot do.

    The sentence is shown to whoever made the request. An engine raises it too, for example for a schema that it cannot
    follow.
    """

    code, told = Code.REQUEST, ""
    status, reason, public = 400, "invalid_request", True
    outcome = "invalid"


class TooLongError(RequestError):
    """The prompt leaves no room for an answer in the model's context. The sentence is OpenAI's, which clients know."""

    code = Code.TOO_LONG
    reason = "context_length_exceeded"


class RefusedError(RequestError):
    """The owner's rules refuse the request, or its answer. The sentence is shown to whoever made the request."""

    code = Code.REFUSED
    outcome = "refused"


RECEIVED: dict[int, type[SlipError]] = {
    kind.code: kind
    for kind in (LinkError, VersionError, IdentityError, MismatchError, BusyError, RequestError, NoWorkerError,
                 VerificationError, LimitError, RefusedError, TooLongError, InternalError)
}  # fmt: skip
"""What an ERROR frame's code stands for where it arrives."""


def locate(error: BaseException) -> str:
    """The kind and the place of an unexpected exception, without its text, which might quote anything."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
