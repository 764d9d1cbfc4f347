"""Bulk scoring: documents a second against transformers.pipeline and the bare model, how busy the model is, and peak memory."""

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
# The command, and then its peak memory in KiB as the kernel counts it since the program began: what getrusage tells of a child
# begins with its parent's.
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
    """A model with its task and the calibration examples that its pruned copy is made from."""

    model: nn.Module
    task: Task
    examples: list[dict[str, Any]]


def corpus(documents: int = 1_200, rounds: int = 3, memory: bool = True) -> dict[str, Any]:
    """Documents of 5 to 400 words in `rounds` Parquet shards. Each round scores one shard in every way, each round beginning
    with another; a ratio is the median over the rounds."""
    keep_kernels()
    found: dict[str, Any] = {"load": os.getloadavg(), "cores": usable_cores(), "documents": documents, "rounds": rounds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder, documents, rounds)
        found["models"] = []
        for name, subject in {"built-in T5": built_in(), "BERT, 6 layers": bert()}.items():
            found["environment"] = environment(subject.model)
            found["models"].append({"model": name, **_compare(subject, folder)})
            print(found["models"][-1], flush=True)
        if memory:
            found["memory"] = _memory(folder)
            print(found["memory"], flush=True)
    return found


def write_corpus(folder: Path, documents: int, shards: int, words: tuple[int, int] = (5, 400), seed: int = 0) -> None:
    """Documents of so many words, evenly, made of the built-in data's sentences."""
    draw = random.Random(seed)
    sentences = [row["input"].split() for name in builtin.tasks() for row in builtin.examples(name)]
    for shard in range(shards):
        texts = []
        for _ in range(documents // shards):
            wanted, of = draw.randint(*words), list[str]()
            while len(of) < wanted:
                of += draw.choice(sentences)
            texts.append(" ".join(of[:wanted]))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{shard:03d}.parquet")


def built_in() -> Subject:
    model, tokenizer = builtin.load()
    rows = builtin.examples(TASK)
    return Subject(model, secateur.TextToText(tokenizer, labels=_labels(rows), max_length=512), rows[:300])


def bert() -> Subject:
    model, tokenizer = minilm.fine_tuned(TASK)
    tokenizer.model_max_length = 512
    return Subject(model, secateur.SequenceClassification(tokenizer), builtin.examples(TASK)[:300])


def _labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({row["target"] for row in rows})


def _compare(subject: Subject, folder: Path) -> dict[str, Any]:
    scores = secateur.attribute(subject.model, subject.task, subject.examples)
    pruned = secateur.prune(subject.model, secateur.plan(scores, flops=0.5, allocation="knapsack"))
    sources, said = find_sources(f"{folder}/*.parquet"), defaultdict[str, list[str]](list)
    rows, _ = next(sources[0].read("text", chunk=2048))
    labels = len(subject.task.label_names(subject.model))
    (sample,) = itertools.islice(
        windows([(rows, 1.0)], subject.task.require_texts(), labels, max_tokens=1 << 20, on_long="cut"), 1
    )
    runners = {
        name: tuned(Runner(model, subject.task.require_texts(), 1), Sample(sample.items), any_dtype=True, say=said[name].append)
        for name, model in {"secateur": subject.model, "secateur, half of the FLOPs": pruned}.items()
    }
    dense = runners["secateur"]
    runners |= {f"{name}, compiled": replace(each, compiled="default", busy=0.0) for name, each in runners.items()}
    seconds = {name: _ready(runner) for name, runner in runners.items() if runner.compiled}
    pipeline, sizes = _pipeline(subject, [row.value for row in rows[:64]])
    times: dict[str, list[float]] = {}
    counts, totals = Counts(), dict.fromkeys(runners, 0.0)
    for k, source in enumerate(sources):
        batches = _batches(dense, source)
        texts = [row.value for chunk, _ in source.read("text") for row in chunk]
        ways: dict[str, Callable[[], Any]] = {name: partial(_scored, runner, source) for name, runner in runners.items()}
        ways["bare model, same batches"] = partial(_bare, dense, batches)
        ways["bare model, compiled"] = partial(_bare, runners["secateur, compiled"], batches)
        ways["pipeline"] = partial(pipeline, texts)
        order = list(ways)
        for name in order[k % len(order) :] + order[: k % len(order)]:
            start = time.perf_counter()
            result = ways[name]()
            times.setdefault(name, []).append(time.perf_counter() - start)
            if name in totals:
                totals[name] += times[name][-1]
                counts += result if name == "secateur" else Counts()
    per_round = counts.rows / len(sources)
    result = {
        "settings": {name: _settings(runner) for name, runner in runners.items()},
        "tried": said,
        "tokens": counts.tokens, "padding": round(1 - counts.tokens / counts.padded, 4),
        "busy": {n: round(r.busy / (totals[n] * r.workers), 4) for n, r in runners.items()},
        "compile_seconds": seconds,
        "pipeline_batch_sizes": sizes,
        "documents/s": {name: round(per_round / statistics.median(of), 1) for name, of in times.items()},
    }  # fmt: skip
    torch.compiler.reset()  # Or what is compiled of this model would be in the way of the next one's.
    result["over_pipeline"] = {name: _ratio(times["pipeline"], times[name]) for name in times}
    result["over_bare"] = {
        "secateur": _ratio(times["bare model, same batches"], times["secateur"]),
        "secateur, compiled": _ratio(times["bare model, compiled"], times["secateur, compiled"]),
    }
    return result


def _settings(runner: Runner) -> dict[str, Any]:
    dtype = str(next(runner.model.parameters()).dtype)
    return {"max_tokens": runner.max_tokens, "workers": runner.workers, "threads": runner.threads, "dtype": dtype}


def _ready(runner: Runner) -> float:
    """Seconds to compile a runner's model, once for the process."""
    began = time.perf_counter()
    with runner.task.scoring(runner.model), runner.compiling():
        return round(time.perf_counter() - began, 1)


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {"median": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3)}


def _scored(runner: Runner, source: Any) -> Counts:
    """From the file to the file."""
    with tempfile.TemporaryDirectory() as out:
        (finished,) = score_shards(runner, [source], Folder(out), Reading(), lambda source: {})
    if finished.error is not None:
        raise RuntimeError(finished.error)
    return finished.counts


def _batches(runner: Runner, source: Any) -> list[Any]:
    """The batches of a shard as tensors."""
    labels = len(runner.task.label_names(runner.model))
    found = windows(source.read("text"), runner.task, labels, max_tokens=runner.max_tokens, on_long="cut")
    batches = [items for window in found for items in runner.batches(window)]
    with torch.inference_mode():  # As the scorer makes them: to what is compiled, others are another case.
        return [runner.task.collate_inputs(items, torch.device("cpu"), runner.padded(items[0].length)) for items in batches]


def _bare(runner: Runner, batches: Sequence[Any]) -> None:
    """The model's forward passes alone, in as many threads."""

    def run(batch: Any) -> None:
        with torch.inference_mode():
            runner.label_scores(batch)

    threads = runner.threads or torch.get_num_threads()
    pool = ThreadPoolExecutor(runner.workers, initializer=torch.set_num_threads, initargs=(threads,))
    with pool, runner.task.scoring(runner.model), runner.compiling():
        list(pool.map(run, batches))


def _pipeline(subject: Subject, texts: list[str]) -> tuple[Callable[[list[str]], Any], dict[int, float]]:
    """transformers' own way with the batch size that is fastest on some texts, and documents a second of each. A pipeline for
    text to text is no longer part of transformers; what it did is a loop of batches through generate."""
    torch.set_num_threads(usable_cores())
    ways = {size: _generate(subject, size) if subject.task.labels else _classify(subject, size) for size in BATCH_SIZES}
    speeds = {}
    for size, way in ways.items():
        way(texts[:8])
        start = time.perf_counter()
        way(texts)
        speeds[size] = round(len(texts) / (time.perf_counter() - start), 1)
    return ways[max(speeds, key=lambda size: speeds[size])], speeds


def _classify(subject: Subject, size: int) -> Callable[[list[str]], Any]:
    from transformers import pipeline

    made = pipeline("text-classification", model=subject.model, tokenizer=subject.task.reader, top_k=None, device="cpu")
    return lambda texts: made(texts, batch_size=size, truncation=True, max_length=512)


def _generate(subject: Subject, size: int) -> Callable[[list[str]], Any]:
    model: Any = subject.model
    tokenizer = subject.task.reader

    def answers(texts: list[str]) -> list[str]:
        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), size):
                inputs = tokenizer(
                    texts[start : start + size], return_tensors="pt", padding=True, truncation=True, max_length=512
                )
                outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
                found += tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return found

    return answers


def _memory(folder: Path, documents: int = 6000) -> dict[str, Any]:
    """Peak resident memory of the command, on so many documents and on ten times as many, of 5 to 60 words."""
    labels = ",".join(_labels(builtin.examples(TASK)))
    found: dict[str, Any] = {}
    for times in (1, 10):
        place = folder / f"memory{times}"
        place.mkdir()
        write_corpus(place, documents * times, times, words=(5, 60))
        command = (
            f"score builtin --data {place}/*.parquet --labels {labels} --out {place}/out --max-tokens 1024 --dtype float32"
        )
        ended = subprocess.run([sys.executable, "-c", PEAK, *command.split()], capture_output=True, text=True, check=True)
        found[f"{documents * times}_documents_mib"] = round(int(ended.stdout.split()[-1]) / 1024, 1)
    first, second = found.values()
    return {**found, "ratio": round(second / first, 4)}


if __name__ == "__main__":
    corpus(*map(int, sys.argv[1:]))  # type: ignore[arg-type]
