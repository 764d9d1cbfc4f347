"""Attribution by two single-threaded processes compared with one, and with a checkpoint after every batch; prints JSON.

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
from secateur.attribution import checkpoint
from secateur.data import builtin

EXAMPLES, MAX_TOKENS = 120, 1024


def main() -> None:
    """Time attribution in all ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, group = dist.get_rank() == 0, dist.group.WORLD
    # With these values a checkpoint is written after every batch.
    checkpoint.MIN_SECONDS, checkpoint.MAX_SHARE = 0.0, float("inf")
    model, tokenizer = builtin.load()
    rows = builtin.examples("movie")[:EXAMPLES]
    task = secateur.TextToText(tokenizer, labels=sorted({row["target"] for row in rows}))

    def attribute(here: bool, **options: Any) -> None:
        if here:
            secateur.attribute(model, task, rows, max_tokens=MAX_TOKENS, **options)
        dist.barrier()  # The idle process waits for the other, so only one function runs at a time.

    with tempfile.TemporaryDirectory() as folder:
        functions = {
            "one": lambda: attribute(first),
            "two": lambda: attribute(True, group=group),
            "checkpoints": lambda: attribute(first, checkpoint=Path(folder) / "c"),
        }
        times = compare(functions, rounds=5, warmup=1)
    if first:
        print(json.dumps({"examples": EXAMPLES, "max_tokens": MAX_TOKENS, **times}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
