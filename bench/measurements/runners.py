"""Bulk scoring of a classifier by torch and by OpenVINO, dense and pruned, with ONNX Runtime in a loop over the same batches.

All ways score the same shards in turn, with one thread each.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from bench.measurements.corpus import Subject, _batches, _ratio, _settings, bert, write_corpus
from secateur.corpus.estimate import documents_a_second
from secateur.corpus.pipeline import Runner
from secateur.corpus.shapes import keep_kernels
from secateur.corpus.shards import Reading
from secateur.corpus.sources import find_sources
from secateur.corpus.tuning import Sample, tuned, usable_cores
from secateur.corpus.windows import windows
from secateur.exporting.onnx_file import FILE, export_onnx
from secateur.support.environment import environment

BASE, MAX_TOKENS = "torch, dense", 1024
_CPU = torch.device("cpu")


def runners(documents: int = 600, rounds: int = 12) -> dict[str, Any]:
    """Score documents of 5 to 400 words in `rounds` shards. Each round scores one shard in every way."""
    keep_kernels()
    torch.set_num_threads(1)
    subject = bert()
    scores = secateur.attribute(subject.model, subject.task, subject.examples)
    models = {"dense": subject.model, "half": secateur.prune(subject.model, secateur.plan(scores, flops=0.5))}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder, documents, rounds)
        sources, tried = find_sources(f"{folder}/*.parquet"), dict[str, list[str]]()
        ways: dict[str, Runner] = {}
        for (name, model), runtime in itertools.product(models.items(), ("torch", "openvino")):
            way = f"{runtime}, {name}"
            ways[way] = tuned(
                Runner(model, subject.task, 1), _sample(subject, sources[0]), max_tokens=MAX_TOKENS, threads=1, any_dtype=True,
                runtime=runtime, say=tried.setdefault(way, []).append,
            )  # fmt: skip
            print(way, tried[way], flush=True)
        speeds: dict[str, list[float]] = {}
        session = _onnx_runtime(subject, folder / FILE)
        for number, source in enumerate(sources):
            rows = [row for chunk, _ in source.read("text") for row in chunk]
            runs: dict[str, Callable[[], float]] = {
                name: partial(documents_a_second, runner, rows, Reading()) for name, runner in ways.items()
            }
            runs["ONNX Runtime, dense"] = partial(_looped, session, _batches(ways["openvino, dense"], source), len(rows))
            order = list(runs)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                speeds.setdefault(name, []).append(runs[name]())
                print(name, f"{speeds[name][-1]:.1f} documents/s", flush=True)
    return {
        "environment": environment(subject.model), "load": os.getloadavg(), "cores": usable_cores(), "threads": 1,
        "documents": documents, "rounds": rounds, "tried": tried,
        "settings": {name: _settings(runner) for name, runner in ways.items()},
        "speeds": {name: [round(speed, 2) for speed in values] for name, values in speeds.items()},
        "documents/s": {name: round(statistics.median(values), 2) for name, values in speeds.items()},
        "over_torch": {name: _ratio(values, speeds[BASE]) for name, values in speeds.items()},
        "half_over_dense": {
            runtime: _ratio(speeds[f"{runtime}, half"], speeds[f"{runtime}, dense"]) for runtime in ("torch", "openvino")
        },
    }  # fmt: skip


def _sample(subject: Subject, source: Any) -> Sample:
    """The items of a shard."""
    rows = [row for chunk, _ in source.read("text") for row in chunk]
    labels = len(subject.task.label_names(subject.model))
    (window, *_) = windows([(rows, 1.0)], subject.task, subject.model, labels, max_tokens=1 << 20, on_long="cut")
    return Sample(window.items, rows)


def _onnx_runtime(subject: Subject, path: Path) -> Callable[[Any], Any]:
    """Return the function that scores a batch with ONNX Runtime in float32 and one thread."""
    import onnxruntime

    inputs = _tensors(subject, subject.task.collate_inputs([subject.task.blank(subject.model, n) for n in (10, 7, 4)], _CPU))
    export_onnx(subject.model, inputs, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: t.numpy() for name, t in _tensors(subject, batch).items()})


def _tensors(subject: Subject, batch: Any) -> dict[str, Tensor]:
    """A batch's tensors as the model takes them."""
    inputs = subject.task.model_inputs(subject.model, batch.inputs)
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _looped(run: Callable[[Any], Any], batches: list[Any], rows: int) -> float:
    """Score all batches. Returns the rows a second."""
    began = time.perf_counter()
    for batch in batches:
        run(batch)
    return rows / (time.perf_counter() - began)
