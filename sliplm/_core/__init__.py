"""The native core, if it was built: `native` is the extension module, or None. All of it has a portable twin.

SLIPLM_BACKEND=portable leaves the core unused, as if it had not been built.
"""

import importlib
import logging
import os
from typing import Any

native: Any = None

if os.environ.get("SLIPLM_BACKEND") != "portable":
    try:
        native = importlib.import_module("sliplm._core._native")
    except ImportError as reason:
        logging.getLogger(__name__).warning(
            "no native core (%s): using the portable path, which is exact but slower", reason
        )
