"""The chat page: one file, which loads nothing and may run nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FILE = Path(__file__).with_name("chat.html")


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: the browser runs only the script, and applies only the style, of these hashes."""
    html = FILE.read_bytes()

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    policy = [
        "default-src 'none'",
        f"script-src {hashes(b'script')}",
        f"style-src {hashes(b'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return html, {
        "content-security-policy": "; ".join(policy),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


async def show(_: Request) -> Response:
    html, headers = _page()
    return Response(html, media_type="text/html", headers=headers)
