"""Files and folders that appear under their final name only when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.support.errors import InputError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file beside its place and renames it; nothing is left if writing fails. An existing file is replaced."""
    path = Path(path)
    require_parent(path)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its final name at the end, or is removed after an exception.

    Raises InputError if something stands there already.
    """
    path = Path(path)
    require_absent(path)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_absent(path: str | Path, kind: str = "folder") -> None:
    """Raises InputError if the output, a file or a folder, exists or its parent does not."""
    if Path(path).exists():
        raise InputError(f"out: expected a {kind} that does not exist yet, got {str(path)!r}, which exists")
    require_parent(Path(path))


def require_parent(path: Path) -> None:
    """Raises InputError if the folder that the output shall lie in does not exist."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"out: expected an existing parent folder, got {str(path)!r}")
