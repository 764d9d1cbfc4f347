"""Bulk scoring by Ray: documents a second of two workers with one thread each, against one worker with one thread.

python -m bench.measurements.corpus_ray [--out FILE]     needs Ray and two idle cores; last line: JSON

The same shards of equal size, in turn with one worker and with two. Timed is the middle of a run, by when the shards' files got
their names: from the third, when every worker has long loaded its model, to the last but one, while none is idle yet.
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
    """The built-in model with two labels, in one thread."""
    model, tokenizer = builtin.load()
    return Runner(model, TextToText(tokenizer, labels=["good", "bad"]), TOKENS, threads=1)


def shards(folder: Path) -> list[Source]:
    """Files of the same documents each."""
    texts = [row["input"] for row in builtin.examples("movie")]
    lines = "".join(json.dumps({"text": texts[k % len(texts)]}) + "\n" for k in range(DOCUMENTS))
    for k in range(SHARDS):
        (folder / f"{k:02d}.jsonl").write_text(lines)
    return find_sources(f"{folder}/*.jsonl")


def about(source: Source) -> dict[str, Any]:
    return {}


def rate(workers: int, sources: list[Source], out: Path) -> float:
    """Documents a second, in the middle of the run."""
    finished = list(score_on_ray(load, workers, load(), sources, Folder(str(out)), Reading(), about))
    if any(each.error for each in finished):
        raise RuntimeError(f"a shard failed: {finished}")
    times = sorted(path.stat().st_mtime for path in (out / SCORED).iterdir())
    return (SHARDS - 1 - FIRST) * DOCUMENTS / (times[-2] - times[FIRST - 1])


def measure() -> dict[str, Any]:
    """The rates of each round, and the median of their ratios. load: the machine's before, of one minute."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, cluster("local"):
        sources = shards(Path(folder))
        for k in range(ROUNDS):
            for workers in _in_turn(k):
                rates[workers].append(rate(workers, sources, Path(folder) / f"{k}-{workers}"))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "load": busy,
        "documents_per_second": {f"{name} workers": [round(each, 1) for each in found] for name, found in rates.items()},
        "ratios": [round(each, 3) for each in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }


def _in_turn(k: int) -> Iterable[int]:
    return (1, 2) if k % 2 == 0 else (2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    found = json.dumps(measure())
    if arguments.out is not None:
        arguments.out.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
