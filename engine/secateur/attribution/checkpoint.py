"""What an attribution has added up so far, and its checkpoints: a killed one goes on and ends in the same scores."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.model.discovery import fingerprint
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically
from secateur.tasks import Item

_SECONDS = 10.0  # Between two checkpoints, at least,
_SHARE = 0.01  # and as long as it takes for writing one to be this share of the time.


@dataclass
class PartialSums:
    """Tensors on the CPU by name, which batches change in place.

    sums: what they add to. largest: what they raise, from 0. batches: how many of this process's batches are in them.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.sums, **self.largest}


class Checkpoint:
    """A folder with a file for each process, which stands in for the batches before: settings, position and partial sums.

    A file is replaced at once or not at all. Raises InputError: a folder that holds something else, or was begun with other
    settings or by another number of processes.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], rank: int, size: int) -> None:
        self.folder, self._settings = Path(folder), json.loads(json.dumps(settings))
        self._file = self.folder / _name(rank, size)
        if not self.folder.absolute().parent.is_dir():
            raise InputError(f"checkpoint: expected an existing parent folder, got {str(folder)!r}")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"checkpoint: expected a folder, got the file {str(folder)!r}")
        if self.folder.exists():
            self._require_ours(size)
        self._written, self._took = time.monotonic(), 0.0

    def restore_(self, partial: PartialSums) -> None:
        """Fill in the sums that an earlier run of this process left, if it left some.

        Raises:
            InputError: The file cannot be read, or was begun with other settings.
        """
        if not self._file.exists():
            return
        with reading("checkpoint", self._file, "cannot be read", typed=False), safe_open(self._file, "pt") as file:
            about = json.loads(file.metadata()["secateur"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, value in self._settings.items():
            if about["settings"].get(name) != value:
                was = about["settings"].get(name)
                raise InputError(f"checkpoint: {str(self.folder)!r} was begun with {name} {was!r}, got {value!r}")
        partial.batches = about["batches"]
        for name, tensor in partial.tensors.items():
            tensor.copy_(tensors[name])

    def keep(self, partial: PartialSums) -> None:
        """Writes, if it is time to."""
        began = time.monotonic()
        if began - self._written < max(_SECONDS, self._took / _SHARE):
            return
        about = {"settings": self._settings, "batches": partial.batches}
        self.folder.mkdir(exist_ok=True)
        write_atomically(self._file, save(partial.tensors, {"secateur": json.dumps(about)}))
        self._written = time.monotonic()
        self._took = self._written - began

    def remove(self) -> None:
        """Once the sums of all processes are known: the folder goes."""
        shutil.rmtree(self.folder, ignore_errors=True)  # Processes that share it do this at the same time.

    def _require_ours(self, size: int) -> None:
        for path in self.folder.iterdir():
            words = path.name.removeprefix(".").split(".")[0].split("-")
            if len(words) != 4 or words[::2] != ["process", "of"]:
                raise InputError(f"checkpoint: expected a new folder or one of a killed run, got {str(self.folder)!r}")
            if words[3] != str(size):
                raise InputError(
                    f"checkpoint: {str(self.folder)!r} was begun by {words[3]} processes, got {size}: it goes on with as many"
                )


def digest(model: nn.Module, items: Iterable[Item]) -> dict[str, str]:
    """Short hashes of the model, its architecture and its weights, and of the tokenised examples."""
    of_items = hashlib.sha256()
    for item in items:
        of_items.update(item.content)
    return {"model": f"{fingerprint(model)}-{weights_digest(model)}", "examples": of_items.hexdigest()[:16]}


def _name(rank: int, size: int) -> str:
    return f"process-{rank}-of-{size}.safetensors"
