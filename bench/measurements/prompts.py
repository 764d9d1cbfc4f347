"""Documents a second of SmolLM2-135M-Instruct with a prompt that all documents share, run once or with each document.

Both ways read the same texts: a task with a `Prompt`, and a task without one on documents that have the prompt's text already.
They take turns, on one thread. The time is the processor's, which other processes of a busy machine hardly change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench.subjects import smollm
from bench.support.interleaved import compare
from secateur.data import builtin
from secateur.support.environment import environment

LABELS = [" good", " bad"]
PREFIX, NEW_TOKENS, MAX_TOKENS = 200, 8, 1024
REVIEW = "Review: {input}\nOpinion:"


@dataclass(frozen=True)
class Ways:
    """Two tasks with the same texts, and what each reads.

    Attributes:
        model: The model.
        tasks: The tasks by name: "whole" and "shared".
        rows: The examples of each.
        prefix: The number of tokens that are shared.
    """

    model: nn.Module
    tasks: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    prefix: int

    def labels(self, name: str) -> Tensor:
        """Return the label scores of all documents."""
        with torch.inference_mode():
            scores: Tensor = self.tasks[name].ranked(self.model, self.rows[name], MAX_TOKENS)
        return scores

    def texts(self, name: str) -> list[str]:
        """Return the generated text of each document."""
        texts: list[str] = self.tasks[name].generate(self.model, self.rows[name], MAX_TOKENS, NEW_TOKENS)
        return texts


def ways(documents: int) -> Ways:
    """Return both ways for so many reviews."""
    model, tokenizer = smollm.load()
    text = _few_shots(tokenizer).replace("{", "{{").replace("}", "}}") + REVIEW
    shared = secateur.CausalLM(tokenizer, labels=LABELS, prompt=text)
    whole = secateur.CausalLM(tokenizer, labels=LABELS)
    rows = [{"input": _review(row)} for row in builtin.examples("movie.test")[:documents]]
    prompted = [{"input": shared.prompted(row["input"])} for row in rows]
    prefix = shared.input_items(model, rows)[0].shared
    return Ways(model, {"whole": whole, "shared": shared}, {"whole": prompted, "shared": rows}, prefix)


def _few_shots(tokenizer: Any) -> str:
    """An instruction and labelled reviews, of at most PREFIX tokens with what comes before a document's own text."""
    text = "Say whether the opinion of each movie review is good or bad.\n\n"
    for row in builtin.examples("movie"):
        longer = f"{text}{REVIEW.format(input=_review(row))} {row['target']}\n\n"
        if len(tokenizer(longer + REVIEW.partition("{")[0].rstrip())["input_ids"]) <= PREFIX:
            text = longer
    return text


def _review(row: dict[str, Any]) -> str:
    """The review alone, without the prompt of the built-in model."""
    return str(row["input"]).removeprefix(builtin.prompt("movie").removesuffix("{input}"))


def prompts(documents: int = 48, rounds: int = 3) -> dict[str, Any]:
    """Time labels and generated texts, both ways in turn."""
    torch.set_num_threads(1)
    both = ways(documents)
    first = Ways(both.model, both.tasks, {name: rows[:2] for name, rows in both.rows.items()}, both.prefix)
    runs: dict[str, Callable[[str], Any]] = {"labels": both.labels, "texts": both.texts}
    ids = [len(item.input_ids) for item in both.tasks["shared"].input_items(both.model, both.rows["shared"])]
    found: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct", "dtype": "float32", "threads": 1, "documents": documents, "rounds": rounds,
        "prefix_tokens": both.prefix, "document_tokens": round(sum(ids) / len(ids) - both.prefix, 1),
        "new_tokens": NEW_TOKENS, "max_tokens": MAX_TOKENS, "load": os.getloadavg(),
    }  # fmt: skip
    results: dict[tuple[str, str], Any] = {}

    def timed(name: str, way: str) -> None:
        results[name, way] = runs[name](way)

    for name in runs:
        getattr(first, name)("shared")  # The first pass of a model is slower, and is not used.
        functions = {way: partial(timed, name, way) for way in ("shared", "whole")}
        times = compare(functions, rounds=rounds, warmup=0, clock=time.process_time)
        speeds = {way: round(1e3 * documents / times[f"{way}_ms"], 3) for way in ("whole", "shared")}
        found[name] = {"documents/s": speeds, "speedup": times["whole_over_shared"]}
    found["largest_difference"] = float((results["labels", "whole"] - results["labels", "shared"]).abs().max())
    found["same_texts"] = sum(a == b for a, b in zip(results["texts", "whole"], results["texts", "shared"], strict=True))
    return {"environment": environment(both.model), **found}
