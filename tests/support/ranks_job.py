"""What test_attribute_ranks.py starts in processes of its own: attributions by ranks, and commands that are easily killed.

python ranks_job.py scores FOLDER, by torchrun; or python ranks_job.py command ARGUMENTS, by torchrun or not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES

import secateur
from secateur.attribution import checkpoint as partial_sums
from secateur.attribution.criteria import PRESETS
from secateur.cli import main

CASE = CASES["t5-gated"]
SMALL, LARGE = 10, 100_000  # max_tokens: several batches for each of two processes, and one batch for both.
POISONED = "tree"  # A word of one example, not of the longest.


def attribute(name: str, max_tokens: int, **options: Any) -> secateur.Scores:
    return secateur.attribute(
        CASE.model(), CASE.task, CASE.examples, criterion=PRESETS[name](), max_tokens=max_tokens, per_example=True, **options
    )


def poisoned() -> torch.nn.Module:
    """A model that gives NaN for an example with one word."""
    model = CASE.model()
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding.weight[CASE.task.reader.convert_tokens_to_ids(POISONED)] = float("nan")
    return model


def by_ranks(folder: Path) -> None:
    """Each criterion's scores, and what each process says of input that is bad in one of them."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    for name in PRESETS:
        for max_tokens in (SMALL, LARGE):
            attribute(name, max_tokens, group=group).save(folder / f"{name}-{max_tokens}-{rank}.safetensors")
    said: list[str] = []
    for model, rows in ((poisoned(), CASE.examples), (CASE.model(), CASE.examples[rank:]), (CASE.model(), [{}] * rank)):
        try:
            secateur.attribute(model, CASE.task, rows, max_tokens=1, group=group)
        except secateur.InputError as error:
            said.append(str(error))
    alone = secateur.attribute(CASE.model(), CASE.task, CASE.examples[rank:])  # No group: each process by itself.
    (folder / f"said-{rank}.json").write_text(json.dumps([*said, alone.examples]))
    dist.destroy_process_group()


def slowly() -> None:
    """A command whose every batch takes a while, and has its checkpoint."""
    partial_sums._SECONDS, partial_sums._SHARE = 0.0, float("inf")
    Path(f"process-{os.getpid()}").touch()  # Whom to kill: torchrun's processes outlive it.
    keep = partial_sums.Checkpoint.keep

    def kept(self: partial_sums.Checkpoint, partial: partial_sums.PartialSums) -> None:
        keep(self, partial)
        time.sleep(0.1)

    partial_sums.Checkpoint.keep = kept  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind = sys.argv.pop(1)
    if kind == "scores":
        by_ranks(Path(sys.argv[1]))
    else:
        slowly()
