"""Bulk scoring: documents per second, how busy the model is, and peak memory.

The rates are compared with transformers.pipeline and with the bare model.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import nn

import secateur
from bench.subjects import minilm
from secateur.corpus.output import Counts, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.shapes import keep_kernels
from secateur.corpus.shards import Reading, score_shards
from secateur.corpus.sources import find_sources
from secateur.corpus.tuning import Sample, tuned, usable_cores
from secateur.corpus.windows import windows
from secateur.data import builtin
from secateur.support.environment import environment
from secateur.tasks import Task

TASK = "domain"
BATCH_SIZES = (1, 8, 32)
# Runs the command and prints its peak memory in KiB, which the kernel counts from the start of the program. getrusage is not
# usable here, because a child's figure starts at its parent's.
PEAK = """
from secateur.cli import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
with open("/proc/self/status") as file:
    print(*(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Subject:
    """A model with its task and the calibration examples for its pruned copy."""

    model: nn.Module
    task: Task
    examples: list[dict[str, Any]]


def corpus(documents: int = 1_200, rounds: int = 3, memory: bool = True) -> dict[str, Any]:
    """Score documents of 5 to 400 words in `rounds` Parquet shards.

    Each round scores one shard in every way and begins with another way. A ratio is the median over the rounds.
    """
    keep_kernels()
    document: dict[str, Any] = {"load": os.getloadavg(), "cores": usable_cores(), "documents": documents, "rounds": rounds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder, documents, rounds)
        document["models"] = []
        for name, subject in {"built-in T5": built_in(), "BERT, 6 layers": bert()}.items():
            document["environment"] = environment(subject.model)
            document["models"].append({"model": name, **_compare(subject, folder)})
            print(document["models"][-1], flush=True)
        if memory:
            document["memory"] = _memory(folder)
            print(document["memory"], flush=True)
    return document


def write_corpus(folder: Path, documents: int, shards: int, words: tuple[int, int] = (5, 400), seed: int = 0) -> None:
    """Write documents from the built-in data's sentences. Their lengths in words are uniform between the two limits."""
    draw = random.Random(seed)
    sentences = [row["input"].split() for name in builtin.tasks() for row in builtin.examples(name)]
    for shard in range(shards):
        texts = []
        for _ in range(documents // shards):
            length, document = draw.randint(*words), list[str]()
            while len(document) < length:
                document += draw.choice(sentences)
            texts.append(" ".join(document[:length]))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{shard:03d}.parquet")


def built_in() -> Subject:
    """Return the built-in T5."""
    model, tokenizer = builtin.load()
    rows = builtin.examples(TASK)
    return Subject(model, secateur.TextToText(tokenizer, labels=_labels(rows), max_length=512), rows[:300])


def bert() -> Subject:
    """Return a fine-tuned BERT classifier."""
    model, tokenizer = minilm.fine_tuned(TASK)
    tokenizer.model_max_length = 512
    return Subject(model, secateur.SequenceClassification(tokenizer), builtin.examples(TASK)[:300])


def _labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the sorted labels of the rows."""
    return sorted({row["target"] for row in rows})


def _compare(subject: Subject, folder: Path) -> dict[str, Any]:
    """Time all ways to score the shards with one subject."""
    scores = secateur.attribute(subject.model, subject.task, subject.examples)
    pruned = secateur.prune(subject.model, secateur.plan(scores, flops=0.5, allocation="knapsack"))
    sources, messages = find_sources(f"{folder}/*.parquet"), defaultdict[str, list[str]](list)
    rows, _ = next(sources[0].read("text", chunk=2048))
    labels = len(subject.task.label_names(subject.model))
    (sample,) = itertools.islice(
        windows([(rows, 1.0)], subject.task, subject.model, labels, max_tokens=1 << 20, on_long="cut"), 1
    )
    runners = {
        name: tuned(Runner(model, subject.task, 1), Sample(sample.items), any_dtype=True, say=messages[name].append)
        for name, model in {"secateur": subject.model, "secateur, half of the FLOPs": pruned}.items()
    }
    dense = runners["secateur"]
    runners |= {f"{name}, compiled": replace(runner, compiled="default", busy=0.0) for name, runner in runners.items()}
    compile_seconds = {name: _ready(runner) for name, runner in runners.items() if runner.compiled}
    pipeline, sizes = _pipeline(subject, [row.value for row in rows[:64]])
    times: dict[str, list[float]] = {}
    counts, totals = Counts(), dict.fromkeys(runners, 0.0)
    for round_number, source in enumerate(sources):
        batches = _batches(dense, source)
        texts = [row.value for chunk, _ in source.read("text") for row in chunk]
        ways: dict[str, Callable[[], Any]] = {name: partial(_scored, runner, source) for name, runner in runners.items()}
        ways["bare model, same batches"] = partial(_bare, dense, batches)
        ways["bare model, compiled"] = partial(_bare, runners["secateur, compiled"], batches)
        ways["pipeline"] = partial(pipeline, texts)
        order = list(ways)
        for name in order[round_number % len(order) :] + order[: round_number % len(order)]:
            start = time.perf_counter()
            result = ways[name]()
            times.setdefault(name, []).append(time.perf_counter() - start)
            if name in totals:
                totals[name] += times[name][-1]
                counts += result if name == "secateur" else Counts()
    per_round = counts.rows / len(sources)
    result = {
        "settings": {name: _settings(runner) for name, runner in runners.items()},
        "tried": messages,
        "tokens": counts.tokens, "padding": round(1 - counts.tokens / counts.padded, 4),
        "busy": {n: round(r.busy / (totals[n] * r.workers), 4) for n, r in runners.items()},
        "compile_seconds": compile_seconds,
        "pipeline_batch_sizes": sizes,
        "documents/s": {name: round(per_round / statistics.median(values), 1) for name, values in times.items()},
    }  # fmt: skip
    torch.compiler.reset()  # Drops this model's compiled code, which would interfere with the next model's.
    result["over_pipeline"] = {name: _ratio(times["pipeline"], times[name]) for name in times}
    result["over_bare"] = {
        "secateur": _ratio(times["bare model, same batches"], times["secateur"]),
        "secateur, compiled": _ratio(times["bare model, compiled"], times["secateur, compiled"]),
    }
    return result


def _settings(runner: Runner) -> dict[str, Any]:
    """Return the runner's settings for the result file."""
    dtype = str(next(runner.model.parameters()).dtype)
    return {"max_tokens": runner.max_tokens, "workers": runner.workers, "threads": runner.threads, "dtype": dtype}


def _ready(runner: Runner) -> float:
    """Return the seconds that the compilation of a runner's model takes. It runs once in the process."""
    began = time.perf_counter()
    with runner.scoring():
        return round(time.perf_counter() - began, 1)


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the largest ratio of the times of the rounds."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {"median": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3)}


def _scored(runner: Runner, source: Any) -> Counts:
    """Score a shard from its input file to its output file."""
    with tempfile.TemporaryDirectory() as out:
        (finished,) = score_shards(runner, [source], Folder(out), Reading(), lambda source: {})
    if finished.error is not None:
        raise RuntimeError(finished.error)
    return finished.counts


def _batches(runner: Runner, source: Any) -> list[Any]:
    """Return the batches of a shard as tensors."""
    labels = len(runner.task.label_names(runner.model))
    shard_windows = windows(source.read("text"), runner.task, runner.model, labels, max_tokens=runner.max_tokens, on_long="cut")
    batches = [items for window in shard_windows for items in runner.batches(window)]
    with torch.inference_mode():  # The scorer builds tensors in this mode. Compiled code treats others as another case.
        return [runner.task.collate_inputs(items, torch.device("cpu"), runner.padded(items[0].length)) for items in batches]


def _bare(runner: Runner, batches: Sequence[Any]) -> None:
    """Run only the model's forward passes, in the runner's number of threads."""

    def run(batch: Any) -> None:
        with torch.inference_mode():
            runner.label_scores(batch)

    threads = runner.threads or torch.get_num_threads()
    pool = ThreadPoolExecutor(runner.workers, initializer=torch.set_num_threads, initargs=(threads,))
    with pool, runner.scoring():
        list(pool.map(run, batches))


def _pipeline(subject: Subject, texts: list[str]) -> tuple[Callable[[list[str]], Any], dict[int, float]]:
    """Return transformers' own way with the batch size that is fastest on some texts, and documents per second by batch size.

    transformers no longer has a pipeline for text to text. Its former pipeline was a loop of batches through `generate`.
    """
    torch.set_num_threads(usable_cores())
    ways = {
        batch_size: _generate(subject, batch_size) if subject.task.labels else _classify(subject, batch_size)
        for batch_size in BATCH_SIZES
    }
    speeds = {}
    for batch_size, way in ways.items():
        way(texts[:8])
        start = time.perf_counter()
        way(texts)
        speeds[batch_size] = round(len(texts) / (time.perf_counter() - start), 1)
    return ways[max(speeds, key=lambda batch_size: speeds[batch_size])], speeds


def _classify(subject: Subject, batch_size: int) -> Callable[[list[str]], Any]:
    """Return a function that classifies texts with transformers' pipeline."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=subject.model, tokenizer=subject.task.reader, top_k=None, device="cpu")
    return lambda texts: classify(texts, batch_size=batch_size, truncation=True, max_length=512)


def _generate(subject: Subject, batch_size: int) -> Callable[[list[str]], Any]:
    """Return a function that generates answers in batches."""
    model: Any = subject.model
    tokenizer = subject.task.reader

    def answers(texts: list[str]) -> list[str]:
        decoded = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                inputs = tokenizer(
                    texts[start : start + batch_size], return_tensors="pt", padding=True, truncation=True, max_length=512
                )
                outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
                decoded += tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return decoded

    return answers


def _memory(folder: Path, documents: int = 6000) -> dict[str, Any]:
    """Measure the command's peak resident memory on `documents` documents and on ten times as many, of 5 to 60 words."""
    labels = ",".join(_labels(builtin.examples(TASK)))
    peaks: dict[str, Any] = {}
    for times in (1, 10):
        corpus_folder = folder / f"memory{times}"
        corpus_folder.mkdir()
        write_corpus(corpus_folder, documents * times, times, words=(5, 60))
        files = f"--data {corpus_folder}/*.parquet --out {corpus_folder}/out"
        command = f"score builtin {files} --labels {labels} --max-tokens 1024 --dtype float32"
        process = subprocess.run([sys.executable, "-c", PEAK, *command.split()], capture_output=True, text=True, check=True)
        peaks[f"{documents * times}_documents_mib"] = round(int(process.stdout.split()[-1]) / 1024, 1)
    first, second = peaks.values()
    return {**peaks, "ratio": round(second / first, 4)}


if __name__ == "__main__":
    corpus(*map(int, sys.argv[1:]))  # type: ignore[arg-type]
