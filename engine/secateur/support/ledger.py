"""A run's finished cells on disk: a killed run goes on where it was, and no cell runs twice."""

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
    """A folder with the settings of a run, and a JSON line for each finished cell.

    A line is on disk before the next cell begins; one that was cut off by a kill is dropped when the run goes on. One process
    at a time may have the folder open; leaving the context lets another one have it. Raises InputError: other settings than
    the folder was begun with; a folder that is in use, or holds something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        began = folder / SETTINGS
        if not began.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"out: expected a new folder or one that this command began, got {str(folder)!r}")
            if not folder.absolute().parent.is_dir():
                raise InputError(f"out: expected an existing parent folder, got {str(folder)!r}")
            folder.mkdir(exist_ok=True)
            write_atomically(began, json.dumps(settings, indent=1) + "\n")
        require_same(folder, _settings(began), settings)
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
        """Writes down that a cell is finished."""
        row = {**cell, **result}
        self._file.write(json.dumps([_key(cell), row]).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[_key(cell)] = row

    def rows(self) -> list[dict[str, Any]]:
        """The finished cells with their results, in the order in which they finished."""
        return list(self.results.values())

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break  # The kill came while this one was written.
            try:
                key, row = json.loads(line)
            except ValueError as error:
                raise InputError(f"out: line {number} of {str(self.folder / CELLS)!r} is no cell ({error})") from error
            self.results[key] = row
            whole += len(line)
        self._file.truncate(whole)


def require_alone(file: IO[Any], folder: Path | str) -> None:
    """Locks a file of the folder for as long as it is open. Raises InputError if another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"out: {str(folder)!r} is in use by another process") from None


def require_same(folder: Path | str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises InputError for a setting that is not as the folder was begun with."""
    wanted = json.loads(json.dumps(settings))
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise InputError(f"{name}: {str(folder)!r} was begun with {found.get(name)!r}, got {wanted[name]!r}")


def _settings(began: Path) -> dict[str, Any]:
    """Return the settings that a folder was begun with. Raises InputError: they cannot be read."""
    with reading("out", began, "is no JSON"):
        settings: dict[str, Any] = json.loads(began.read_text())
    return settings


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
