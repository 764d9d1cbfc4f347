"""A corpus of many short documents, through three SIGKILLs and a clock that jumps: all counts right, memory and time flat.

`SECATEUR_SOAK` is the number of documents of the slow test, a million by default.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from cases import CASES

import secateur
from secateur.data import builtin

# The machine's clock cannot be set. Each second reading of it is a year later than the ones between.
START = """
import itertools, time
import datetime
import secateur.cli.shared.tell as tell
YEAR, clock, readings = 365 * 86400, time.time, itertools.count()
def moved():
    return clock() + YEAR * (next(readings) % 2)
class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(moved(), tz)
time.time, tell.datetime = moved, Moved
from secateur.cli import main
main()
"""
OPTIONS = "--keep-columns id --max-tokens 1024 --dtype float32 --compile off --engine-runtime torch --log log.txt"
# What the last quarter of the documents may take over the second one. Rounding of allocators and a busy machine are within it.
MEMORY, TIME = 1.05, 1.5
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Moment:
    """What a process has done and holds at one time.

    Attributes:
        documents: Documents of the shards that are finished.
        bytes: Its memory (resident set).
        seconds: Its processor time.
    """

    documents: int
    bytes: int
    seconds: float


def write_corpus(folder: Path, documents: int, shards: int) -> int:
    """Write JSONL shards of documents of one to eight words, row by row. Returns the documents of a shard."""
    folder.mkdir()
    text = " ".join(row["input"] for row in builtin.examples("movie")[:200])
    words, draws, each = text.split(), random.Random(0), -(-documents // shards)
    for shard in range(shards):
        with open(folder / f"{shard:05d}.jsonl", "w") as file:
            for number in range(shard * each, min((shard + 1) * each, documents)):
                row = {"id": number, "text": " ".join(draws.choices(words, k=draws.randint(1, 8)))}
                file.write(json.dumps(row) + "\n")
    return each


def finished(folder: Path) -> int:
    """The number of finished shards."""
    return (
        sum(not name.startswith(".") for name in os.listdir(folder / "out/shards")) if (folder / "out/shards").is_dir() else 0
    )


def watched(folder: Path, line: str, each: int, until: int) -> tuple[int, list[Moment]]:
    """Run the command, and kill it once so many shards are finished. Returns its exit code, and its moments."""
    with open(folder / "messages.txt", "a") as messages:
        process = subprocess.Popen(
            [sys.executable, "-c", START, *line.split()], cwd=folder, stdout=subprocess.DEVNULL, stderr=messages
        )
    moments: list[Moment] = []
    while process.poll() is None:
        done = finished(folder)
        if done >= until:
            process.kill()
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        moments.append(Moment(done * each, int(stat[21]) * PAGE, (int(stat[11]) + int(stat[12])) / TICKS))
        time.sleep(0.1)
    return process.returncode, moments


def soaked(folder: Path, line: str, documents: int, shards: int) -> tuple[list[Moment], dict[str, Any]]:
    """Score a corpus with a kill at each of three shares of it. Returns the moments of the last run, and figures."""
    each, began = write_corpus(folder / "corpus", documents, shards), time.perf_counter()
    for number, share in enumerate((0.05, 0.1, 0.2)):
        resume = " --resume" if number else ""
        code, _ = watched(folder, f"{line} --out out{resume}", each, max(1, int(share * shards)))
        assert code == -signal.SIGKILL, (folder / "messages.txt").read_text()
        assert finished(folder) < shards
    before, last = finished(folder), time.perf_counter()
    code, moments = watched(folder, f"{line} --out out --resume", each, shards + 1)
    assert code == 0, (folder / "messages.txt").read_text()
    summary, took = json.loads((folder / "out/summary.json").read_text()), time.perf_counter() - last
    # The command measures its time by another clock than the one that jumps.
    assert 0 < summary["seconds"] <= took
    # Its rate counts its own documents: not those of the killed runs.
    assert summary["documents_per_second"] == pytest.approx((documents - before * each) / summary["seconds"], rel=1e-3)
    require_all(folder, summary, documents, shards)
    return moments, {
        "seconds": time.perf_counter() - began,
        "documents/s": summary["documents_per_second"],
        "tokens": summary["tokens"],
    }


def require_all(folder: Path, summary: dict[str, Any], documents: int, shards: int) -> None:
    """Check that each document has its scores once and in order, that the counts say so, and that nothing else is left."""
    expected = 0
    for path in sorted((folder / "out/shards").iterdir()):
        ids = pyarrow.parquet.read_table(path, columns=["id"]).column("id").to_pylist()
        assert ids == list(range(expected, expected + len(ids)))
        expected += len(ids)
    assert expected == documents
    assert (summary["rows"], summary["scored"], summary["rejected"]) == (documents, documents, 0)
    assert (summary["shards"], summary["failed"], sum(summary["labels"].values())) == (shards, [], documents)
    assert not list((folder / "out").rglob("*.partial"))
    years = {line[:4] for line in (folder / "log.txt").read_text().splitlines()}
    assert len(years) >= 2, "the clock has not jumped"


def quarters(moments: list[Moment]) -> list[list[Moment]]:
    """The moments of the documents' quarters, without the start of the process."""
    scoring = [moment for moment in moments if moment.documents > moments[0].documents and moment.bytes]
    first, last = scoring[0].documents, scoring[-1].documents
    bounds = [first + (last - first) * k / 4 for k in range(5)]
    return [[moment for moment in scoring if low <= moment.documents <= high] for low, high in itertools.pairwise(bounds)]


def test_a_killed_run_whose_clock_jumps_counts_each_document_once(tmp_path: Path) -> None:
    secateur.save((case := CASES["bert-sequence"]).model(), tmp_path / "m", tokenizer=case.task.reader)
    soaked(tmp_path, f"score m --data corpus/*.jsonl --threads 1 {OPTIONS}", 10_000, 20)


@pytest.mark.slow
def test_a_million_documents(tmp_path: Path) -> None:
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=["good", "bad"])
    scores = secateur.attribute(model, task, builtin.examples("movie")[:40])
    secateur.save(secateur.prune(model, secateur.plan(scores, flops=0.1)), tmp_path / "m", tokenizer=tokenizer)
    documents = int(os.environ.get("SECATEUR_SOAK", "1000000"))
    line = f"score m --data corpus/*.jsonl --labels good,bad --threads 2 {OPTIONS}"
    moments, figures = soaked(tmp_path, line, documents, documents // 2000)
    of_quarters = quarters(moments)
    memory = [max(moment.bytes for moment in of_quarter) for of_quarter in of_quarters]
    seconds = [
        (of_quarter[-1].seconds - of_quarter[0].seconds) / (of_quarter[-1].documents - of_quarter[0].documents)
        for of_quarter in of_quarters
    ]
    print(f"{documents:,} documents: {figures}")
    print(
        f"memory of quarters in MiB: {[round(of / 2**20) for of in memory]}, "
        f"processor time of a document in ms: {[round(1000 * of, 3) for of in seconds]}"
    )
    assert memory[3] <= MEMORY * memory[1]
    assert seconds[3] <= TIME * seconds[1]
