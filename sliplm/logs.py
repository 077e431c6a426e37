"""Structured logs: one JSON object a line. What is logged never holds a prompt, a weight or a secret."""

from __future__ import annotations

import datetime
import json
import logging

from sliplm.errors import locate

FIELDS = ("device", "request", "outcome", "prompt_tokens", "completion_tokens", "seconds")
"""What a record may carry besides its message: logging's `extra`."""


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message; and `error`, the kind and place of an exception without its
    text, which might quote anything."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        entry = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = locate(record.exc_info[1])
        return json.dumps(entry)
