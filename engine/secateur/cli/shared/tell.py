"""Report an error in one line on stderr."""

from __future__ import annotations

import sys

from secateur.support.urls import redacted


def tell(message: str) -> None:
    """Print an error message as one line on stderr. Passwords in URLs are hidden."""
    print("secateur: " + redacted(" ".join(message.split())), file=sys.stderr, flush=True)
