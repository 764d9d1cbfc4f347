"""The program that test_ranks.py starts in separate processes: attributions by ranks, and slow commands to kill.

`python ranks_job.py scores FOLDER` must be started by torchrun. `python ranks_job.py command ARGUMENTS` may be.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import CASES

import secateur
from secateur.attribution import checkpoint as partial_sums
from secateur.attribution.criteria import PRESETS
from secateur.cli import main

CASE = CASES["t5-gated"]
# Values of max_tokens: SMALL gives each of two processes several batches, LARGE gives one batch to both together.
SMALL, LARGE = 10, 100_000
POISONED = "tree"  # A word that one example contains, and not the longest one.


def attribute(name: str, max_tokens: int | None, **options: Any) -> secateur.Scores:
    """Score the case's units by a named criterion, and keep each example's scores."""
    return secateur.attribute(
        CASE.model(), CASE.task, CASE.examples, criterion=PRESETS[name](), max_tokens=max_tokens, per_example=True, **options
    )


def poisoned() -> torch.nn.Module:
    """Return a model that gives NaN for examples that contain the poisoned word."""
    model = CASE.model()
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding.weight[CASE.task.reader.convert_tokens_to_ids(POISONED)] = float("nan")
    return model


def by_ranks(folder: Path) -> None:
    """Save the scores of all criteria, and the error messages of each process for input that is bad in one process."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    for name in PRESETS:
        for max_tokens in (SMALL, LARGE):
            attribute(name, max_tokens, group=group).save(folder / f"{name}-{max_tokens}-{rank}.safetensors")
    messages: list[str] = []
    for model, rows in ((poisoned(), CASE.examples), (CASE.model(), CASE.examples[rank:]), (CASE.model(), [{}] * rank)):
        try:
            secateur.attribute(model, CASE.task, rows, max_tokens=1, group=group)
        except secateur.InputError as error:
            messages.append(str(error))
    alone = secateur.attribute(CASE.model(), CASE.task, CASE.examples[rank:])  # Without a group, a process works alone.
    with patch("secateur.attribution.attribute.pass_tokens", lambda *_, **options: (LARGE, SMALL)[rank] * options["processes"]):
        attribute("gradient", None, group=group).save(folder / f"own-{rank}.safetensors")
    (folder / f"messages-{rank}.json").write_text(json.dumps([*messages, alone.examples]))
    dist.destroy_process_group()


def slowly() -> None:
    """Run a command that waits and writes a checkpoint after every batch."""
    partial_sums.MIN_SECONDS, partial_sums.MAX_SHARE = 0.0, float("inf")
    Path(f"process-{os.getpid()}").touch()  # Names the process to kill: torchrun's processes outlive torchrun.
    keep = partial_sums.Checkpoint.keep

    def keep_slowly(self: partial_sums.Checkpoint, partial: partial_sums.PartialSums) -> None:
        keep(self, partial)
        time.sleep(0.1)

    partial_sums.Checkpoint.keep = keep_slowly  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode = sys.argv.pop(1)
    if mode == "scores":
        by_ranks(Path(sys.argv[1]))
    else:
        slowly()
