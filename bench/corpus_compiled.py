"""Bulk scoring compiled against not compiled: CPU time of one thread, wall time of one thread on each core, time to compile."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from corpus import Subject, bert, built_in, usable_cores
from interleaved import compare

from secateur import builtin
from secateur.benchmarking import environment
from secateur.corpus.pipeline import Runner
from secateur.corpus.windows import Window
from secateur.tasks import Item
from secateur.tasks.base import buckets


def compilation(batches: int = 16, rounds: int = 5, max_tokens: int = 256) -> dict[str, Any]:
    """So many batches, drawn from those of 200 documents of 5 to 400 words, each way in turn; a ratio is how many times as fast
    the compiled model is."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"load": os.getloadavg(), "cores": usable_cores(), "max_tokens": max_tokens, "models": []}
    for name, subject in {"built-in T5": built_in(), "BERT, 6 layers": bert()}.items():
        subject.model.eval()
        found["environment"] = environment(subject.model)
        found["models"].append({"model": name, **_compare(subject, batches, rounds, max_tokens)})
        print(found["models"][-1], flush=True)
    return {**found, "load_after": os.getloadavg()}


def _compare(subject: Subject, batches: int, rounds: int, max_tokens: int) -> dict[str, Any]:
    every = buckets(_items(subject), max_tokens)
    chosen = random.Random(1).sample(every, min(batches, len(every)))
    plain = Runner(subject.model, subject.task, max_tokens, threads=1)
    made = replace(plain, compiled="default")
    wall, cpu = time.perf_counter(), time.process_time()
    with subject.task.scoring(subject.model), made.compiling():
        about = {"compile_seconds": time.perf_counter() - wall, "compile_cpu_seconds_here": time.process_time() - cpu}
        change = max(float((_scores(plain, [items]) - _scores(made, [items])).abs().max()) for items in chosen)
        one = {"compiled": partial(_scores, made, chosen), "plain": partial(_scores, plain, chosen)}
        with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            many = {name: partial(_in_threads, pool, runner, chosen) for name, runner in (("compiled", made), ("plain", plain))}
            return {
                **{name: round(seconds, 1) for name, seconds in about.items()},
                "log_score_change": change,
                "one_thread_cpu_time": compare(one, rounds=rounds, warmup=1, clock=time.process_time),
                "all_cores_wall_time": compare(many, rounds=rounds, warmup=1),
            }


def _items(subject: Subject) -> list[Item]:
    draw = random.Random(0)
    sentences = [row["input"].split() for name in builtin.tasks() for row in builtin.examples(name)]
    texts = []
    for _ in range(200):
        wanted, of = draw.randint(5, 400), list[str]()
        while len(of) < wanted:
            of += draw.choice(sentences)
        texts.append(" ".join(of[:wanted]))
    return [Item(row, subject.task.cut(ids), []) for row, ids in enumerate(subject.task.encode(texts))]


def _scores(runner: Runner, batches: Sequence[list[Item]]) -> torch.Tensor:
    """The label scores of the batches' items, one batch after the other."""
    labels = len(runner.task.label_names(runner.model))
    items = [replace(item, row=row) for row, item in enumerate(item for batch in batches for item in batch)]
    window = Window(0, 1.0, [], [None] * len(items), items, torch.zeros(len(items), labels).numpy())
    first = 0
    with torch.inference_mode():
        for batch in batches:
            runner.score(window, items[first : first + len(batch)])
            first += len(batch)
    return torch.from_numpy(window.scores)


def _in_threads(pool: ThreadPoolExecutor, runner: Runner, batches: Sequence[list[Item]]) -> None:
    list(pool.map(lambda batch: _scores(runner, [batch]), batches))
