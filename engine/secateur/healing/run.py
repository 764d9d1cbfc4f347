"""Run: the folder of a healing's checkpoints, from which a killed healing goes on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically
from secateur.support.ledger import Ledger


class Run:
    """A folder with the results of finished stages, the weights behind them, and the Trainer's checkpoints.

    Attributes:
        training: The folder of the Trainer's checkpoints.
        lasts: Whether the folder outlives the process.

    Args:
        folder: The folder.
        ledger: The results; None where this process keeps none.
        lasts: As the attribute.
    """

    def __init__(self, folder: Path, ledger: Ledger | None, *, lasts: bool = True) -> None:
        self.training = folder / "training"
        self.lasts = lasts
        self._folder, self._ledger = folder, ledger

    def once(self, stage: str, compute: Callable[[], dict[str, Any]], model: nn.Module | None = None) -> dict[str, Any]:
        """Return the results of a stage, which runs unless it has finished in an earlier process.

        Args:
            stage: The name of the stage.
            compute: Runs the stage, and returns its results.
            model: The model that the stage trains. It gets the weights of an earlier process.
        """
        cell, file = {"stage": stage}, self._folder / f"{stage}.safetensors"
        if self._ledger is not None and cell in self._ledger:
            if model is not None:
                _load_(model, file)
            return next(row for row in self._ledger.rows() if row["stage"] == stage)
        results = compute()
        if self._ledger is not None:
            if model is not None:
                weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
                write_atomically(file, save(weights))
            self._ledger.add(cell, results)
        return results


@contextmanager
def run_in(folder: str | Path | None, settings: Mapping[str, Any]) -> Iterator[Run]:
    """Open the folder of a healing.

    Args:
        folder: The folder, which is left as it is at the end; None for a temporary one.
        settings: What tells one healing from another. A begun folder goes on with the same settings only.

    Raises:
        InputError: As `Ledger`; or there are several processes and no folder that they share.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if folder is None:
        if several:
            raise InputError("checkpoints: expected a folder that all processes share, got none")
        with tempfile.TemporaryDirectory(prefix="secateur-heal-") as temporary:
            yield Run(Path(temporary), None, lasts=False)
    elif os.environ.get("RANK", "0") != "0":
        yield Run(Path(folder), None)  # The first process keeps the results. The others compute the same.
    else:
        with Ledger(Path(folder), settings, argument="checkpoints") as ledger:
            yield Run(Path(folder), ledger)


def _load_(model: nn.Module, file: Path) -> None:
    """Give a model's parameters the values in a file."""
    with reading("checkpoints", file, "is damaged; delete its folder to begin anew"):
        weights = load_file(file)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
