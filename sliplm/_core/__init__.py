"""The native core, if it was built: `native` is the extension module, or None. All of it has a portable twin.

SLIPLM_BACKEND=portable leaves the core unused, as if it had not been built.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from sliplm._core import _native

    class Native:
        """The extension module as a type, which "a module or None" needs and modules lack; all from the stub."""

        isas = staticmethod(_native.isas)
        threads = staticmethod(_native.threads)
        limit_threads = staticmethod(_native.limit_threads)
        PackedMatrix = _native.PackedMatrix
        is_canonical = staticmethod(_native.is_canonical)
        low_bits = staticmethod(_native.low_bits)
        project = staticmethod(_native.project)
        encode = staticmethod(_native.encode)
        verify = staticmethod(_native.verify)
        decode = staticmethod(_native.decode)
        LowRank32 = _native.LowRank32
        LowRank16 = _native.LowRank16
        Ragged = _native.Ragged
        rms_norm = staticmethod(_native.rms_norm)
        gated = staticmethod(_native.gated)
        rotate = staticmethod(_native.rotate)
        first_seen = staticmethod(_native.first_seen)
        attend = staticmethod(_native.attend)
        Records = _native.Records
        wait_readable = staticmethod(_native.wait_readable)


native: "type[Native] | None" = None

if os.environ.get("SLIPLM_BACKEND") != "portable":
    try:
        native = cast("type[Native]", importlib.import_module("sliplm._core._native"))
    except ImportError as reason:
        logging.getLogger(__name__).warning(
            "no native core (%s): using the portable path, which is exact but slower", reason
        )
