"""Partial sums of an attribution, and their checkpoints: a killed attribution continues and ends in the same scores."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.model.discovery import config_digest, fingerprint
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError, reading
from secateur.support.files import open_own, require_alone, require_run_folder, write_atomically
from secateur.tasks import Item

MIN_SECONDS = 10.0  # The shortest time between two checkpoints.
MAX_SHARE = 0.01  # The largest share of the time that writing checkpoints may take.


@dataclass
class PartialSums:
    """Tensors on the CPU by name. Each batch changes them in place.

    Attributes:
        sums: Tensors that batches add to.
        largest: Tensors that start at 0 and that batches raise to their largest value.
        batches: The number of this process's batches that the tensors contain.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of both kinds by name."""
        return {**self.sums, **self.largest}


class Checkpoint:
    """A folder with one file for each process: the settings, the position in the data and the partial sums.

    With it, a killed run need not score its finished batches again. A file is replaced as a whole or not at all.

    Args:
        folder: The folder. It need not exist, but its parent must.
        settings: The settings of the attribution, as JSON values. A checkpoint serves only a run with the same settings.
        rank: The rank of this process.
        size: The number of processes.

    Raises:
        InputError: The folder cannot be written to, contains other files, or was begun by another number of processes. The
            methods raise it where another run uses the folder.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], rank: int, size: int) -> None:
        self.folder, self._settings = Path(folder), json.loads(json.dumps(settings))
        self._file = self.folder / _file_name(rank, size)
        require_run_folder(self.folder, "checkpoint")
        if self.folder.exists():
            self._require_own_files(size)
        self._written_at, self._write_seconds = time.monotonic(), 0.0
        self._lock: IO[bytes] | None = None

    @staticmethod
    def require_not_begun(folder: Path) -> None:
        """Check that a folder holds no partial sums.

        Raises:
            InputError: It holds some.
        """
        if any(folder.glob("process-*-of-*.safetensors")):
            raise InputError(
                f"checkpoint: {str(folder)!r} was begun already; add --resume to continue it, or name a new folder"
            )

    @staticmethod
    def begun_with(folder: Path, name: str) -> Any:
        """Return a setting that the sums in a folder were begun with, or None where there are none.

        Raises:
            InputError: A file of sums cannot be read.
        """
        for file in sorted(folder.glob("process-*-of-*.safetensors")):
            with _reading(file) as (_, about):
                return about["settings"][name]
        return None

    def restore_(self, partial: PartialSums) -> None:
        """Copy the sums of an earlier, killed run into `partial`. Do nothing if this process has no file.

        Args:
            partial: The sums, all at 0. Tensors and the number of batches are overwritten.

        Raises:
            InputError: The file cannot be read, or was begun with other settings.
        """
        if not self._file.exists():
            return
        self._require_alone()
        with _reading(self._file) as (file, about):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            before, batches = {**about["settings"]}, int(about["batches"])
            for name, value in self._settings.items():
                if before.get(name) != value:
                    raise InputError(
                        f"checkpoint: {str(self.folder)!r} was begun with {name} {before.get(name)!r}, got {value!r}"
                    )
            for name, tensor in partial.tensors.items():
                tensor.copy_(tensors[name])
        partial.batches = batches

    def keep(self, partial: PartialSums) -> None:
        """Write the sums to disk, unless the last checkpoint is too recent.

        Args:
            partial: The sums so far.
        """
        began = time.monotonic()
        if began - self._written_at < max(MIN_SECONDS, self._write_seconds / MAX_SHARE):
            return
        about = {"settings": self._settings, "batches": partial.batches}
        self.folder.mkdir(exist_ok=True)
        self._require_alone()
        write_atomically(self._file, save(partial.tensors, {"secateur": json.dumps(about)}))
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - began

    def remove(self) -> None:
        """Delete the folder. Call this once all processes have the sums of all."""
        shutil.rmtree(self.folder, ignore_errors=True)  # Other processes may delete the shared folder at the same time.

    def close(self) -> None:
        """Release the lock. A later call may continue from the folder then, unless `remove` has deleted it."""
        if self._lock is not None:
            self._lock.close()

    def _require_alone(self) -> None:
        """Lock this process's place in the folder until `close`. Raise InputError if another run has it."""
        if self._lock is None:
            self._lock = open_own(self._file.with_suffix(".lock"))
            require_alone(self._lock, self.folder, "checkpoint")

    def _require_own_files(self, size: int) -> None:
        """Raise InputError if the folder holds files that are no checkpoints of `size` processes."""
        for path in self.folder.iterdir():
            words = path.name.removeprefix(".").split(".")[0].split("-")
            if words == ["run"] and path.suffix == ".partial":
                continue  # Another process tries whether the folder can be written to.
            if len(words) != 4 or words[::2] != ["process", "of"]:
                raise InputError(f"checkpoint: expected a new folder or one of a killed run, got {str(self.folder)!r}")
            if words[3] != str(size):
                raise InputError(f"checkpoint: expected {words[3]} processes, which began {str(self.folder)!r}, got {size}")


def digest(model: nn.Module, items: Iterable[Item]) -> dict[str, str]:
    """Hash the model and the tokenised examples, to recognise them in a checkpoint.

    Args:
        model: The model. Its architecture, its weights and its config are hashed.
        items: The tokenised examples.

    Returns:
        Short hashes: "model", "config" and "examples".
    """
    examples_hash = hashlib.sha256()
    for item in items:
        examples_hash.update(item.content)
    weights = f"{fingerprint(model)}-{weights_digest(model)}"
    return {"model": weights, "config": config_digest(model), "examples": examples_hash.hexdigest()[:16]}


@contextmanager
def _reading(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Provide a process's file, and its metadata. Raise InputError if it, or what is read of it, is damaged."""
    with (
        reading("checkpoint", path, "is damaged; delete its folder to begin anew", also=(RuntimeError,)),
        safe_open(path, "pt") as file,
    ):
        yield file, json.loads(file.metadata()["secateur"])


def _file_name(rank: int, size: int) -> str:
    """Return the name of a process's file."""
    return f"process-{rank}-of-{size}.safetensors"
