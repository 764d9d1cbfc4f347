"""Bulk scoring by Ray: documents per second of two single-threaded workers, compared with one.

python -m bench.measurements.corpus_ray [--out FILE]     needs Ray and two idle cores; the last line is JSON

One worker and two workers score the same shards of equal size in turn. The timed part is the middle of a run, measured by the
times at which the shards' files get their final names. It begins at the third shard, when every worker has long loaded its
model. It ends at the last shard but one, while no worker is idle yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur import TextToText
from secateur.corpus.output import SCORED, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.ray_engine import cluster, score_on_ray
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Source, find_sources
from secateur.data import builtin

SHARDS, DOCUMENTS, FIRST, ROUNDS, TOKENS = 10, 3000, 3, 5, 1024


def load() -> Runner:
    """Return the built-in model with two labels, with one thread."""
    model, tokenizer = builtin.load()
    return Runner(model, TextToText(tokenizer, labels=["good", "bad"]), TOKENS, threads=1)


def shards(folder: Path) -> list[Source]:
    """Write files that all hold the same documents."""
    texts = [row["input"] for row in builtin.examples("movie")]
    lines = "".join(json.dumps({"text": texts[k % len(texts)]}) + "\n" for k in range(DOCUMENTS))
    for k in range(SHARDS):
        (folder / f"{k:02d}.jsonl").write_text(lines)
    return find_sources(f"{folder}/*.jsonl")


def about(source: Source) -> dict[str, Any]:
    """Return the metadata of a shard, which is empty here."""
    return {}


def rate(workers: int, sources: list[Source], out: Path) -> float:
    """Return documents per second in the middle of the run."""
    finished = list(score_on_ray(load, workers, load(), sources, Folder(str(out)), Reading(), about))
    if any(shard.error for shard in finished):
        raise RuntimeError(f"a shard failed: {finished}")
    times = sorted(path.stat().st_mtime for path in (out / SCORED).iterdir())
    return (SHARDS - 1 - FIRST) * DOCUMENTS / (times[-2] - times[FIRST - 1])


def measure() -> dict[str, Any]:
    """Return the rates of each round and the median of their ratios.

    `load` is the machine's load average of one minute before.
    """
    rates: dict[int, list[float]] = {1: [], 2: []}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, cluster("local"):
        sources = shards(Path(folder))
        for round_number in range(ROUNDS):
            for workers in _in_turn(round_number):
                rates[workers].append(rate(workers, sources, Path(folder) / f"{round_number}-{workers}"))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "load": load_before,
        "documents_per_second": {
            f"{name} workers": [round(value, 1) for value in worker_rates] for name, worker_rates in rates.items()
        },
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }


def _in_turn(round_number: int) -> Iterable[int]:
    """Return the order of the worker counts in a round."""
    return (1, 2) if round_number % 2 == 0 else (2, 1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    arguments = parser.parse_args()
    document = json.dumps(measure())
    if arguments.out is not None:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
