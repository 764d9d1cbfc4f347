"""Files and folders that appear under their final name only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.support.errors import InputError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file under a temporary name in the same folder, then rename it. If writing fails, no file is left.

    Args:
        path: The file. An existing file is replaced.
        content: The content. Text is written as UTF-8.

    Raises:
        InputError: The parent folder does not exist.
    """
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
    """A context that provides a temporary folder and gives it its final name at the end. An exception deletes the folder.

    Args:
        path: The final name.

    Yields:
        The temporary folder, in the same parent folder.

    Raises:
        InputError: The path exists already, or its parent folder does not exist.
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
    """Check that an output does not exist yet and that its parent folder does.

    Args:
        path: The output.
        kind: The kind of output for the message: "folder" or "file".

    Raises:
        InputError: The output exists, or its parent folder does not.
    """
    if Path(path).exists():
        raise InputError(f"out: expected a {kind} that does not exist yet, got {str(path)!r}, which exists")
    require_parent(Path(path))


def require_parent(path: Path) -> None:
    """Check that the parent folder of an output exists.

    Args:
        path: The output.

    Raises:
        InputError: The parent folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"out: expected an existing parent folder, got {str(path)!r}")
