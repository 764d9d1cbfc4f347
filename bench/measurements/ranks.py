"""attribute by two processes against one, a thread each, and with a checkpoint after every batch; prints JSON.

torchrun --nproc-per-node 2 -m bench.measurements.ranks
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import secateur
from bench.support.interleaved import compare
from secateur.attribution import checkpoint as partial_sums
from secateur.data import builtin

EXAMPLES, MAX_TOKENS = 120, 1024


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, group = dist.get_rank() == 0, dist.group.WORLD
    # A checkpoint is written whenever one may be, which is after every batch.
    partial_sums._SECONDS, partial_sums._SHARE = 0.0, float("inf")
    model, tokenizer = builtin.load()
    rows = builtin.examples("movie")[:EXAMPLES]
    task = secateur.TextToText(tokenizer, labels=sorted({row["target"] for row in rows}))

    def attribute(here: bool, **options: Any) -> None:
        if here:
            secateur.attribute(model, task, rows, max_tokens=MAX_TOKENS, **options)
        dist.barrier()  # Whoever has nothing to do waits for the other, so that one function runs at a time.

    with tempfile.TemporaryDirectory() as folder:
        functions = {
            "one": lambda: attribute(first),
            "two": lambda: attribute(True, group=group),
            "checkpoints": lambda: attribute(first, checkpoint=Path(folder) / "c"),
        }
        found = compare(functions, rounds=5, warmup=1)
    if first:
        print(json.dumps({"examples": EXAMPLES, "max_tokens": MAX_TOKENS, **found}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
