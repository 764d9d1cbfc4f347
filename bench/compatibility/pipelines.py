"""transformers' pipelines."""

from __future__ import annotations

import json
from typing import Any

import torch

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome


def pipelines(folder: Folder) -> Outcome:
    """Compare `pipeline(...)` on the folder with direct calls of the model."""
    return _classifies(folder) if folder.family == "bert" else _generates(folder)


def _pipeline(kind: str, folder: Folder) -> Any:
    """Build a pipeline of this kind on the folder."""
    from transformers import pipeline

    return pipeline(kind, model=str(folder.model), **({} if folder.stock else {"trust_remote_code": True}))


def texts(folder: Folder) -> list[str]:
    """Return 16 texts of the built-in task."""
    lines = (folder.path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["input"] for line in lines[:16]]


def _classifies(folder: Folder) -> Outcome:
    """Compare the pipeline's labels and scores with the model's probabilities."""
    asked, model, tokenizer = texts(folder), folder.load(), folder.tokenizer()
    answers = _pipeline("text-classification", folder)(asked)
    config: Any = model.config
    largest_difference = 0.0
    for text, answer in zip(asked, answers, strict=True):
        with torch.inference_mode():
            probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        best = int(probabilities.argmax())
        if config.id2label[best] != answer["label"]:
            return Outcome("fails", f"label {answer['label']}, the model's is {config.id2label[best]}")
        largest_difference = max(largest_difference, abs(float(probabilities[best]) - answer["score"]))
    return Outcome(
        "works",
        f"text-classification: labels the same, scores within {largest_difference:.1e}",
        {"score_difference": largest_difference},
    )


def _generates(folder: Folder) -> Outcome:
    """Compare the pipeline's text with the output of `generate`."""
    text, model, tokenizer = texts(folder)[0], folder.load(), folder.tokenizer()
    answers = _pipeline("text-generation", folder)(text, max_new_tokens=12, do_sample=False, return_full_text=False)
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    generate: Any = model.generate
    continuation = generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(continuation, skip_special_tokens=True)
    if answers[0]["generated_text"].strip() != expected.strip():
        return Outcome("fails", f"text-generation: {answers[0]['generated_text']!r}, by hand {expected!r}")
    return Outcome("works", "text-generation: the text of `generate`")
