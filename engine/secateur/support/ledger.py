"""A run's finished cells on disk: a killed run continues where it stopped, and no cell runs twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically

SETTINGS, CELLS = "settings.json", "cells.jsonl"


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

    Raises:
        InputError: The folder was begun with other settings, is in use, contains something else, or has no parent folder.

    Example:
        >>> with Ledger(Path("out"), {"seed": 0}) as ledger:
        ...     for cell in cells:
        ...         if cell not in ledger:
        ...             ledger.add(cell, compute(cell))
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        settings_file = folder / SETTINGS
        if not settings_file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"out: expected a new folder or one that this command began, got {str(folder)!r}")
            if not folder.absolute().parent.is_dir():
                raise InputError(f"out: expected an existing parent folder, got {str(folder)!r}")
            folder.mkdir(exist_ok=True)
            write_atomically(settings_file, json.dumps(settings, indent=1) + "\n")
        require_same(folder, _read_settings(settings_file), settings)
        self.results: dict[str, dict[str, Any]] = {}
        self._file = open(folder / CELLS, "a+b")  # noqa: SIM115
        try:
            require_alone(self._file, folder)
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
            try:
                key, row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"out: expected a finished cell in line {number} of {str(self.folder / CELLS)!r}, got no JSON ({error})"
                ) from error
            self.results[key] = row
            complete_bytes += len(line)
        self._file.truncate(complete_bytes)


def require_alone(file: IO[Any], folder: Path | str) -> None:
    """Lock an open file of a folder until the file is closed.

    Args:
        file: The file.
        folder: The folder, for the message.

    Raises:
        InputError: Another process has locked the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"out: {str(folder)!r} is in use by another process") from None


def require_same(folder: Path | str, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a run has the settings that its folder was begun with.

    Args:
        folder: The folder, for the message.
        stored: The settings that the folder was begun with.
        settings: The settings of the run.

    Raises:
        InputError: A setting differs. The message begins with the name of the setting.
    """
    as_json = json.loads(json.dumps(settings))
    for name in as_json:
        if stored.get(name) != as_json[name]:
            raise InputError(f"{name}: {str(folder)!r} was begun with {stored.get(name)!r}, got {as_json[name]!r}")


def _read_settings(file: Path) -> dict[str, Any]:
    """Return the settings that a folder was begun with. Raise InputError if they cannot be read."""
    with reading("out", file, "is no JSON"):
        settings: dict[str, Any] = json.loads(file.read_text())
    return settings


def _key(cell: Mapping[str, Any]) -> str:
    """Return a text that identifies a cell."""
    return json.dumps(cell, sort_keys=True)
