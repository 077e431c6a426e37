"""What can go wrong, each as one sentence a person can act on. The command line prints it and nothing else."""

from __future__ import annotations

import traceback
from pathlib import Path


class SlipError(Exception):
    """Base of every error this package raises on purpose. Its text never holds a secret."""


class BundleError(SlipError):
    """A bundle is missing, damaged, of another version, or does not belong to its counterpart."""


class UnsupportedModelError(SlipError):
    """The model cannot be read, or has layers that cannot be protected; the text names them."""


class NumericsError(SlipError):
    """An activation is not a finite number; the text names the layer."""


class IdentityError(SlipError):
    """A certificate or an identity file is missing, malformed, expired, or not enrolled."""


class LinkError(SlipError):
    """The other side is unreachable, went away, or did not answer in time."""


class ProtocolError(LinkError):
    """The other side sent something the protocol does not allow."""


class VersionError(ProtocolError):
    """The two sides have no version of the protocol in common."""


class VerificationError(LinkError):
    """An answer of the edge failed its check (Freivalds). Nothing computed from it is ever returned."""


class InternalError(SlipError):
    """Something inside the trusted side is broken, so the same request would fail again. The text is the same whatever
    it is; the log there says more."""


def locate(error: BaseException) -> str:
    """The kind and the place of an unexpected exception, without its text, which might quote anything."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
