"""Passwords and tokens in URLs, which must not reach files or messages."""

from __future__ import annotations

import re

# A URL's user and password, up to the last @ before the path. A password that is not encoded may hold slashes. A number
# before a slash is a port.
_USER = re.compile(r"(?<=://)(?:[^/?#\s'\"]*|[^/?#\s'\"@:]+:(?!\d+/)[^\s'\"?#]*)@")
_SECRET = re.compile(
    r"([?&#;][\w.~%-]*(?:token|sig|secret|pass|pwd|key|cred|auth|session|code|jwt)[\w.~%-]*=)[^&#;\s'\"]+", re.IGNORECASE
)
_HIDDEN = "***"


def redacted(text: str) -> str:
    """Return a text in which *** stands for the users and passwords of URLs, and for the secrets of their queries.

    Args:
        text: A path, a URL, a message or a JSON document.

    Example:
        >>> redacted("cannot read 's3://me:word@bucket/a.jsonl?token=abc&part=1'")
        "cannot read 's3://***@bucket/a.jsonl?token=***&part=1'"
    """
    return _SECRET.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
