"""Report an error in one line on stderr."""

from __future__ import annotations

import sys


def tell(message: str) -> None:
    """Print an error message as one line on stderr."""
    print("secateur: " + " ".join(message.split()), file=sys.stderr, flush=True)
