"""transformers' pipelines."""

from __future__ import annotations

import json
from typing import Any

import torch

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome


def pipelines(folder: Folder) -> Outcome:
    """`pipeline(...)` on the folder, against the model called by hand."""
    return _classifies(folder) if folder.family == "bert" else _generates(folder)


def _pipeline(kind: str, folder: Folder) -> Any:
    from transformers import pipeline

    return pipeline(kind, model=str(folder.model), **({} if folder.stock else {"trust_remote_code": True}))


def _texts(folder: Folder) -> list[str]:
    lines = (folder.path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["input"] for line in lines[:16]]


def _classifies(folder: Folder) -> Outcome:
    texts, model, tokenizer = _texts(folder), folder.load(), folder.tokenizer()
    found = _pipeline("text-classification", folder)(texts)
    config: Any = model.config
    away = 0.0
    for text, answer in zip(texts, found, strict=True):
        with torch.inference_mode():
            chances = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        best = int(chances.argmax())
        if config.id2label[best] != answer["label"]:
            return Outcome("fails", f"label {answer['label']}, the model's is {config.id2label[best]}")
        away = max(away, abs(float(chances[best]) - answer["score"]))
    return Outcome("works", f"text-classification: labels the same, scores within {away:.1e}", {"score_difference": away})


def _generates(folder: Folder) -> Outcome:
    text, model, tokenizer = _texts(folder)[0], folder.load(), folder.tokenizer()
    found = _pipeline("text-generation", folder)(text, max_new_tokens=12, do_sample=False, return_full_text=False)
    ids = tokenizer(text, return_tensors="pt")
    ids.pop("token_type_ids", None)
    generate: Any = model.generate
    made = generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    if found[0]["generated_text"].strip() != expected.strip():
        return Outcome("fails", f"text-generation: {found[0]['generated_text']!r}, by hand {expected!r}")
    return Outcome("works", "text-generation: the text of `generate`")
