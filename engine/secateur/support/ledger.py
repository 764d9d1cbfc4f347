"""A run's finished cells on disk: a killed run continues where it stopped, and no cell runs twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import read_object, require_fields, require_type, shown
from secateur.support.files import open_own, require_alone, require_run_folder, write_atomically
from secateur.support.urls import redacted

SETTINGS, CELLS = "settings.json", "cells.jsonl"
ROWS = "rows"  # The setting that holds the hash of a run's examples.
_BEGUN = re.compile(r"\.settings\.json\.[0-9a-f]{8}\.partial")


class Ledger:
    """A folder with the settings of a run, and one JSON line for each finished cell. A cell is one part of the run's work.

    A line is on disk before the next cell begins. If a kill cuts off a line, the line is dropped when the run continues. Only
    one process at a time may have the folder open. Leaving the context closes it.

    Attributes:
        folder: The folder.
        results: The finished cells with their results, by a key of the cell.

    Args:
        folder: The folder. It is created if it does not exist.
        settings: The settings of the run, as JSON values.
        results: The type of each result that a finished cell must have, by name, as `fields.require_type` knows it.
        argument: The argument that names the folder, which error messages begin with.

    Raises:
        InputError: The folder was begun with other settings, is in use, contains something else, has damaged files, cannot be
            written to, or has no parent folder.

    Example:
        >>> with Ledger(Path("out"), {"seed": 0}) as ledger:
        ...     for cell in cells:
        ...         if cell not in ledger:
        ...             ledger.add(cell, compute(cell))
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        results: Mapping[str, Any] | None = None,
        *,
        argument: str = "out",
    ) -> None:
        self.folder, self._kinds, self._argument = folder, results or {}, argument
        settings_file = folder / SETTINGS
        require_run_folder(folder, argument)
        if not settings_file.exists():
            # A run that was killed while it wrote its settings leaves their temporary file.
            if folder.exists() and not all(_BEGUN.fullmatch(path.name) for path in folder.iterdir()):
                raise InputError(f"{argument}: expected a new folder or one that this command began, got {str(folder)!r}")
            folder.mkdir(exist_ok=True)
            write_atomically(settings_file, redacted(json.dumps(settings, indent=1)) + "\n")
        require_same(folder, _read_settings(settings_file, argument), settings)
        self.results: dict[str, dict[str, Any]] = {}
        self._file = open_own(folder / CELLS)
        try:
            require_alone(self._file, folder, argument)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        return _key(cell) in self.results

    def add(self, cell: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record that a cell is finished, and write its line to disk.

        Args:
            cell: The values that identify the cell.
            result: The cell's results.
        """
        row = {**cell, **result}
        self._file.write(json.dumps([_key(cell), row]).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[_key(cell)] = row

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished cells with their results, in the order in which they finished."""
        return list(self.results.values())

    def _read(self) -> None:
        """Read the finished cells, and drop a line that a kill has cut off."""
        self._file.seek(0)
        complete_bytes = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break  # A kill has cut off this line.
            with reading(
                self._argument, self.folder / CELLS, f"is damaged in line {number}; delete this line, and its cell is run again"
            ):
                key, row = _entry(json.loads(line))
                require_fields("results", row, self._kinds)
                self.results[key] = row
            complete_bytes += len(line)
        self._file.truncate(complete_bytes)


def require_not_begun(folder: Path, argument: str = "out") -> None:
    """Check that a folder holds no run of a `Ledger`.

    Args:
        folder: The folder.
        argument: The argument that the message begins with.

    Raises:
        InputError: A run was begun in it.
    """
    if (folder / SETTINGS).exists():
        raise InputError(f"{argument}: {str(folder)!r} was begun already; add --resume to continue it, or name a new folder")


def content_hash(content: Any) -> str:
    """Return a short hash of JSON values, such as the rows of a data set. Other values count by their text.

    Args:
        content: The values.
    """
    return hashlib.sha256(json.dumps(content, default=str).encode(errors="surrogatepass")).hexdigest()[:16]


def file_state(path: Path) -> list[int]:
    """Return a file's size in bytes and the time of its last change in nanoseconds, which together tell whether it changed.

    Args:
        path: The file.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f"data: no such file: {str(path)!r}")
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def require_same(folder: Path | str, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a run has the settings that its folder was begun with.

    Args:
        folder: The folder, for the message.
        stored: The settings that the folder was begun with.
        settings: The settings of the run.

    Raises:
        InputError: A setting differs. The message begins with the name of the setting.
    """
    as_json = json.loads(redacted(json.dumps(settings)))
    for name in as_json:
        if stored.get(name) != as_json[name]:
            changed = "; the examples have changed: give the former ones, or a new folder" if name == ROWS else ""
            raise InputError(f"{name}: {str(folder)!r} was begun with {stored.get(name)!r}, got {as_json[name]!r}{changed}")


def _read_settings(file: Path, argument: str) -> dict[str, Any]:
    """Return the settings that a folder was begun with. Raise InputError if they cannot be read."""
    with reading(argument, file, "is damaged; delete its folder to begin the run anew"):
        return read_object(file)


def _entry(content: Any) -> tuple[str, dict[str, Any]]:
    """Return the key and the row of a line. Raise FieldError if the row is not that of the key's cell."""
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[0], str):
        raise FieldError(f"expected the key of a cell and its results, got {shown(content)}")
    cell, row = json.loads(content[0]), content[1]
    require_type("cell", dict[str, Any], cell)
    require_type("results", dict[str, Any], row)
    for name, value in cell.items():
        if name not in row or row[name] != value:
            raise FieldError(f"results.{name}: expected {shown(value)}, as in the key, got {shown(row.get(name))}")
    return content[0], row


def _key(cell: Mapping[str, Any]) -> str:
    """Return a text that identifies a cell."""
    return json.dumps(cell, sort_keys=True)
