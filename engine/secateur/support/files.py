"""Files and folders that appear under their final name only when they are complete, and locks on outputs."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from secateur.support.command import RUN_FILE, RUNNING
from secateur.support.errors import InputError
from secateur.support.fields import shown

T = TypeVar("T")
_OWN_FILES = (RUN_FILE, "secateur.json")  # A folder with one of them is secateur's own.
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)
_replaced: set[Path] = set()  # Existing outputs that claims of this process allow to replace.


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file under a temporary name in the same folder, then rename it. If writing fails, no file is left.

    The temporary files of killed writers of the same file are removed first.

    Args:
        path: The file. An existing file is replaced.
        content: The content. Text is written as UTF-8.

    Raises:
        InputError: The parent folder does not exist.
    """
    path = Path(path)
    require_parent(path)
    with _partial(path, folder=False) as (partial, descriptor):
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A context that provides a temporary folder and gives it its final name at the end. An exception deletes the folder.

    The temporary folders of killed writers of the same folder are removed first. At the end, the modes of all files follow the
    umask, because safetensors lets only the owner read the files that it writes. The output folder of a command gets its
    `RUN_FILE` before its name, so that a kill leaves no folder without this mark of secateur.

    Args:
        path: The final name.

    Yields:
        The temporary folder, in the same parent folder.

    Raises:
        InputError: The path exists already and no claim allows to replace it, or its parent folder does not exist or cannot be
            written to.
    """
    path = Path(path)
    require_absent(path)
    with _partial(path, folder=True) as (partial, descriptor):
        yield partial
        command = RUNNING.get()
        if command is not None and command.makes(path):
            (partial / RUN_FILE).write_text(command.run_file, encoding="utf-8")
        readable = os.fstat(descriptor).st_mode & 0o666  # The folder was created with the umask.
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(readable)
        if path.absolute() in _replaced and os.path.lexists(path):
            _exchange(partial, path)
            _remove(partial)  # The former folder.
        else:
            partial.rename(path)


def final_name(path: str | Path) -> Path:
    """Return a path as it will be when the `new_folder` around it has its name. Other paths stay as they are."""
    parts = (_PARTIAL.fullmatch(part) for part in Path(path).parts)
    return Path(*(match["name"] if match else part for match, part in zip(parts, Path(path).parts, strict=True)))


@contextmanager
def claimed(
    path: str | Path, kind: str = "folder", *, overwrite: bool = False, inputs: Iterable[tuple[str, str]] = ()
) -> Iterator[None]:
    """Keep other processes from making an output while this process makes it. The output must not exist yet.

    With `overwrite`, `new_folder` and `write_atomically` replace an existing output by the complete new one, in one step. Until
    then the former output stays as it is.

    A lock file stands beside the output for that time. The kernel releases the lock of a killed process, and the next run takes
    over its lock file and removes its temporary files.

    Args:
        path: The output.
        kind: The kind of output for the message: "folder" or "file".
        overwrite: Whether the output may exist, if secateur wrote it and none of the inputs is in it.
        inputs: The inputs of the command: the name of each argument with a path, or with several between commas.

    Raises:
        InputError: The output has no name or one that is not UTF-8, or exists and may not be replaced; its parent folder does
            not exist or cannot be written to; or another process makes the output.
    """
    path = Path(path)
    _require_name(path, kind)
    if overwrite and os.path.lexists(path):
        _require_replaceable(path, kind, inputs)
        _replaced.add(path.absolute())
    try:
        with _alone_at(path, kind):
            yield
    finally:
        _replaced.discard(path.absolute())


@contextmanager
def _alone_at(path: Path, kind: str) -> Iterator[None]:
    """Lock an output that does not exist, or that a claim allows to replace. Leftovers of killed processes are removed."""
    lock = path.with_name(f".{path.name}.lock")
    if os.path.lexists(path) and lock.is_file():
        _remove_if_free(lock)  # Its process was killed after it had made the output.
    require_absent(path, kind)
    with open_own(lock) as file:
        require_alone(file, path)
        if not _is_at(lock, file.fileno()):  # The process that had the lock has just ended, and removed the lock file.
            raise InputError(f"out: {str(path)!r} is in use by another process")
        try:
            require_absent(path, kind)
            _remove_leftovers(path)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _require_replaceable(path: Path, kind: str, inputs: Iterable[tuple[str, str]]) -> None:
    """Raise InputError unless secateur wrote an output, and none of a command's inputs is in it."""
    if path.is_symlink() or not (path.is_dir() if kind == "folder" else path.is_file()) or not _is_own(path):
        raise InputError(f"overwrite: expected a {kind} that secateur wrote, got {str(path)!r}; delete or rename it yourself")
    place = path.resolve()
    for name, value in inputs:
        for part in (value, *value.split(",")):
            # The resolved path of a pattern of files is a pattern too.
            if part and Path(part.strip()).resolve().is_relative_to(place):
                raise InputError(f"overwrite: expected an output that is no input, got {str(path)!r}, which {name} names")


def _is_own(path: Path) -> bool:
    """Tell whether secateur wrote a folder (of a command), or a file (of scores or a plan)."""
    if path.is_dir():
        return any((path / name).is_file() for name in _OWN_FILES)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:1] == b"{":
                return bool({"format", "fingerprint"} <= json.loads(start + file.read()).keys())
            header = json.loads(file.read(min(int.from_bytes(start, "little"), path.stat().st_size)))
            return bool("secateur" in header["__metadata__"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    # Not every system can swap in one step. A kill between these steps leaves the former folder under the name "....old".
    aside = other.with_name(f".{other.name}.{secrets.token_hex(4)}.old")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)


def _require_name(path: Path, kind: str, argument: str = "out") -> None:
    """Refuse an output without a name, such as ".", or with a name that is not UTF-8, which tokenizers cannot write to."""
    try:
        named = bool(str(path.absolute()).encode()) and bool(path.name)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise InputError(f"{argument}: expected the name of a new {kind}, in UTF-8, got {str(path)!r}")


def open_own(path: str | Path) -> IO[bytes]:
    """Open one of secateur's own files, such as a lock, to read and to append. It is created if it does not exist.

    A link is not followed, so nobody can make secateur write to a file elsewhere.

    Args:
        path: The file.

    Raises:
        InputError: The path is a link, no regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        why = "which is a link" if Path(path).is_symlink() else f"which cannot be opened ({error.strerror})"
        raise InputError(f"out: expected a file of secateur's own, got {str(path)!r}, {why}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"out: expected a file of secateur's own, got {str(path)!r}, which is no regular file")
    return os.fdopen(descriptor, "a+b")


def create_own(path: str | Path) -> IO[bytes]:
    """Create a file to write, in place of a file or link of this name.

    Args:
        path: The file.
    """
    Path(path).unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def require_alone(file: IO[Any], folder: Path | str, argument: str = "out") -> None:
    """Lock an open file until it is closed.

    Args:
        file: The file.
        folder: The output that the lock stands for, for the message.
        argument: The argument that the message begins with.

    Raises:
        InputError: Another process has locked the file.
    """
    if not _locked(file.fileno(), unlockable=True):
        raise InputError(f"{argument}: {str(folder)!r} is in use by another process")


def require_absent(path: str | Path, kind: str = "folder", argument: str = "out") -> None:
    """Check that an output does not exist yet, or that a claim allows to replace it; and that its parent can be written to.

    Args:
        path: The output.
        kind: The kind of output for the message: "folder" or "file".
        argument: The argument that the message begins with.

    Raises:
        InputError: The output exists, or its parent folder does not exist or cannot be written to.
    """
    path = Path(path)
    if os.path.lexists(path) and path.absolute() not in _replaced:
        raise InputError(f"{argument}: expected a {kind} that does not exist yet, got {str(path)!r}, which exists")
    require_parent(path, argument)
    _require_writable(path.parent, path, argument)


def require_run_folder(folder: str | Path, argument: str = "out") -> None:
    """Check that a run's folder, which may exist, can be written to; if it does not exist, that it can be created.

    Args:
        folder: The folder.
        argument: The argument that the message begins with.

    Raises:
        InputError: The folder or its parent folder cannot be written to, is no folder, or the parent does not exist.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        _require_name(folder, "folder", argument)
        require_absent(folder, argument=argument)
    elif not folder.is_dir():
        raise InputError(f"{argument}: expected a folder, got the file {str(folder)!r}")
    else:
        _require_writable(folder, folder / "run", argument)


def require_parent(path: Path, argument: str = "out") -> None:
    """Check that the parent folder of an output exists.

    Args:
        path: The output.
        argument: The argument that the message begins with.

    Raises:
        InputError: The parent folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{argument}: expected an existing parent folder, got {str(path)!r}")


def require_regular(argument: str, path: Path) -> None:
    """Check that an existing path is a regular file. Reading from a pipe or a device may wait for ever.

    Args:
        argument: The argument that the message begins with.
        path: The path.

    Raises:
        InputError: The path exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "pipe" if path.is_fifo() else "device or socket"
        raise InputError(f"{argument}: expected a file, got the {kind} {str(path)!r}")


def _require_writable(folder: Path, path: Path, argument: str) -> None:
    """Raise InputError if no file can be created in a folder. Mode bits alone do not tell: the file system may be read-only."""
    try:
        with _partial(path, folder=False):
            pass
    except OSError as error:
        got = f"{str(folder)!r} ({error.strerror})"
        raise InputError(f"{argument}: expected a folder that can be written to, got {got}") from error


@contextmanager
def _partial(path: Path, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """Create a file or a folder with a temporary name beside `path`, and yield its path and its open descriptor.

    It stays locked until the context ends. Then it is removed, unless it has been renamed. The lock tells a later writer that
    this process lives.
    """
    _remove_leftovers(path)
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        if folder:
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        if _locked(descriptor, unlockable=True) and _is_at(partial, descriptor):
            break
        os.close(descriptor)  # Another process took it for a leftover before it was locked.
    try:
        yield partial, descriptor
    finally:
        if _is_at(partial, descriptor):
            _remove(partial)
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of `path` whose writers were killed: nobody holds their locks."""
    for entry in os.scandir(path.parent):
        match = _PARTIAL.fullmatch(entry.name)
        if match and match["name"] == path.name:
            _remove_if_free(Path(entry.path))


def _remove_if_free(path: Path) -> None:
    """Remove a file or a folder of secateur's own that no process has locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # It is a link, another user's, or was renamed in between.
    try:
        if _locked(descriptor, unlockable=False) and _is_at(path, descriptor):
            _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder with its content."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _locked(descriptor: int, *, unlockable: bool) -> bool:
    """Try to lock an open file or folder. `unlockable` is the result on a file system that has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unlockable
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether a path still names the open file or folder."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def object_or_file(argument: str, value: Any, kind: type[T], load: Callable[[str | Path], T], hint: str) -> T:
    """Return an argument that is an object, or the path of a file that holds one.

    Args:
        argument: The name of the argument.
        value: The object or the path.
        kind: The object's class.
        load: Reads a file.
        hint: The end of the error message, which says how to make the object.

    Raises:
        InputError: The value is neither, or the file cannot be read.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, (str, Path)):
        return load(value)
    raise InputError(f"{argument}: expected secateur.{kind.__name__} or the path of its file, got {shown(value)}; {hint}")
