"""The first hour of a new user, as real processes: install, prune, score, kill, resume, load without secateur.

A new virtual environment gets the package from a copy of the checkout, by `pip install`. pip may use the network, and nothing
else does. The model is a small BERT with a WordPiece tokenizer of its own, both trained here on this repository's data.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import pyarrow
import pyarrow.parquet
import pytest
import torch
from pages import ROOT
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

pytestmark = pytest.mark.slow

ROWS, PART = 20_000, 1_000
PARTS = ROWS // PART
EMPTY = 12_345  # The row of the one document without text, which is rejected.
KILLED_AFTER = (3, 10)  # The finished parts that each kill waits for.
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", "site", "build", "dist", "demo-out")
# Runs the lines that `secateur prune` prints, and writes the logits of a few texts, beside the names of the classes.
PLAIN = """
import importlib.util, json, sys
assert importlib.util.find_spec("secateur") is None
exec(sys.argv[1])
import torch
texts = json.load(sys.stdin)
logits = model.eval()(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
assert not [name for name in sys.modules if name.partition(".")[0] in ("secateur", "secateur_kernels")]
print(json.dumps({"names": model.config.id2label, "logits": logits.tolist()}))
"""


class User:
    """A user with a new environment and a working folder.

    Attributes:
        folder: The working folder, which has train.csv, test.csv, documents.parquet and the model's folder `classifier`.
    """

    def __init__(self, root: Path) -> None:
        self.folder, self._bin = root / "work", root / "venv" / "bin"
        # Modules outside of the environment, and the caches of the machine's user, must not help. pip keeps its configuration.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        caches = {"XDG_CACHE_HOME": str(root / "cache"), "HF_HOME": str(root / "cache" / "hf"), "HF_HUB_OFFLINE": "1"}
        self._environment = {**kept, **caches, "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        self.folder.mkdir()

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a program of the environment."""
        command, pipe = [str(self._bin / words[0]), *words[1:]], subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self._environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program of the environment to its end."""
        process = self.start(*words)
        out, errors = process.communicate(text, timeout=1800)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    def done(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program that must succeed."""
        result = self.run(*words, text=text)
        assert result.returncode == 0, result.stderr[-3000:]
        return result


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    """A user who has installed the package as README.md says, with the versions of constraints.txt, and who has a model."""
    root = tmp_path_factory.mktemp("first-hour")
    shutil.copytree(ROOT, root / "secateur", ignore=shutil.ignore_patterns(*LEFT_OUT))
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    person = User(root)
    pip = ("pip", "install", "--quiet", "--disable-pip-version-check")
    person.done(*pip, "--constraint", str(root / "secateur" / "constraints.txt"), str(root / "secateur"))
    shutil.rmtree(root / "secateur")
    write_inputs(person.folder)
    return person


def write_inputs(folder: Path) -> None:
    """Write a trained classifier, two CSV files with the columns `text` and `label`, and one Parquet file of documents."""
    content = gzip.decompress((ROOT / "examples/data/domain.train.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in content.splitlines()]
    pairs = [(row["input"].removeprefix("domain: "), row["target"]) for row in rows]
    pairs = [(text, label) for text, label in pairs if text.strip()]
    save_classifier(folder / "classifier", pairs[:4000])
    for name, part in (("train.csv", pairs[4000:4400]), ("test.csv", pairs[5000:5400])):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    draws = random.Random(0)
    texts = [" ".join(draws.choice(pairs)[0] for _ in range(draws.randint(1, 3))) for _ in range(ROWS)]
    texts[EMPTY] = ""
    documents = pyarrow.table({"id": [f"document {k}" for k in range(ROWS)], "text": texts})
    pyarrow.parquet.write_table(documents, folder / "documents.parquet")


def save_classifier(folder: Path, pairs: Sequence[tuple[str, str]], steps: int = 120, batch_size: int = 32) -> None:
    """Train a small BERT classifier and its tokenizer on texts with labels, and save them."""
    texts, names = [text for text, _ in pairs], sorted({label for _, label in pairs})
    learned = BertWordPieceTokenizer(lowercase=True)
    learned.train_from_iterator(texts, vocab_size=4000, show_progress=False)
    tokenizer = BertTokenizer(vocab=learned.get_vocab(), model_max_length=128)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, total_iters=20)
    for step in range(steps):
        part = pairs[step * batch_size : (step + 1) * batch_size]
        batch = tokenizer([text for text, _ in part], padding=True, truncation=True, max_length=32, return_tensors="pt")
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([names.index(label) for _, label in part])).loss.backward()
        optimizer.step()
        warmup.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def finished(out: Path) -> dict[str, tuple[int, bytes]]:
    """The finished parts of a run: the time of change and the content of each file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "shards").glob("[!.]*.parquet")}


def killed_after(user: User, parts: int, *words: str) -> tuple[str, dict[str, tuple[int, bytes]]]:
    """Start `secateur score`, kill it when so many parts are finished, and return its messages and the finished parts."""
    process = user.start("secateur", *words)
    while process.poll() is None and len(list((user.folder / "scored" / "shards").glob("[!.]*.parquet"))) < parts:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, errors
    return errors, finished(user.folder / "scored")


def cells(out: str, name: str) -> list[str]:
    """The cells of a row of a printed table."""
    (row,) = re.findall(rf"^{re.escape(name)} .*$", out, flags=re.MULTILINE)
    return re.split(r" {2,}", row.strip())[1:]


def test_prune_score_kill_resume_and_load_without_secateur(user: User) -> None:
    loading = prune(user)
    rows = score_with_kills(user)
    load_without_secateur(user, loading, rows)


def prune(user: User) -> list[str]:
    """Prune the classifier, check what the command prints, and return the lines of Python that load the new folder."""
    result = user.done(
        "secateur", "prune", *["classifier", "--data", "train.csv", "--eval", "test.csv", "--flops", "0.5", "--out", "smaller"]
    )
    assert "columns: the input is 'text', the target is 'label'" in result.stderr.splitlines()
    dense, pruned = (float(cell) for cell in cells(result.stdout, "accuracy"))
    assert dense > 0.5  # Four classes: chance is a quarter.
    assert pruned >= dense - 0.05
    assert "pruned equals masked: " in result.stdout
    lines = result.stdout.splitlines()
    end = lines[lines.index("written to smaller") + 1 :]
    assert [line for line in end if not line.startswith("  ")][:2] == ["load it:", "score with it:"]
    assert end[-1].startswith(
        "serve it: it runs in transformers (AutoModelForSequenceClassification, with trust_remote_code=True"
    )
    scoring = end[end.index("score with it:") + 1].strip()
    assert scoring == "secateur score smaller --data 'documents/*.parquet' --column text --out scored"
    loading = [line.strip() for line in end[1 : end.index("score with it:")]]
    card = (user.folder / "smaller" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(loading) in card
    assert scoring in card
    assert not [path.name for path in user.folder.glob(".*")]
    return loading


def score_with_kills(user: User) -> list[dict[str, Any]]:
    """Score the documents in a run that is killed twice, and in an undisturbed one; return the rows, which are the same."""
    words = f"score smaller --data documents.parquet --keep-columns id --dtype float32 --part-rows {PART}".split()
    killed = (*words, "--out", "scored")
    errors, before = killed_after(user, KILLED_AFTER[0], *killed)
    assert f"{PARTS} shards, 0 of them finished before" in errors
    assert "measuring how the model runs fastest" in errors
    refused = user.run("secateur", *killed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1] == "secateur: out: 'scored' was begun already; --resume continues it"
    errors, between = killed_after(user, KILLED_AFTER[1], *killed, "--resume")
    assert f"{PARTS} shards, {len(before)} of them finished before" in errors
    assert "as begun: max_tokens " in errors
    assert "None" not in errors
    result = user.done("secateur", *killed, "--resume")
    assert f"{PARTS} shards, {len(between)} of them finished before" in result.stderr
    assert KILLED_AFTER[0] <= len(before) < len(between) < PARTS
    after = finished(user.folder / "scored")
    assert before.items() <= between.items() <= after.items()
    assert len(after) == PARTS

    counts = [("documents", ROWS), ("scored", ROWS - 1), ("rejected", 1), ("shards", PARTS)]
    for name, count in counts:
        assert cells(result.stdout, name) == [f"{count:,}"]
    assert result.stdout.splitlines()[-2:] == [
        "the rejected documents and the reasons are in scored/rejects", "scores in scored"
    ]  # fmt: skip
    summary = json.loads((user.folder / "scored" / "summary.json").read_text())
    assert [summary[name] for name in ("rows", "scored", "rejected", "shards", "failed")] == [ROWS, ROWS - 1, 1, PARTS, []]

    # A new folder measures again how the model runs fastest, so the undisturbed run is told what the killed one measured.
    measured = json.loads((user.folder / "scored" / "settings.json").read_text())["tuned"]
    threads = measured["workers"] * (measured["threads"] or 1)
    same = ("--threads", str(threads), "--max-tokens", str(measured["max_tokens"]))
    user.done("secateur", *words, "--out", "whole", *same)
    whole, scored = corpora.read(user.folder / "whole"), corpora.read(user.folder / "scored")
    assert list(scored) == [f"documents.part-{k:05d}-of-{PARTS:05d}.parquet" for k in range(PARTS)]
    rows = [row for part in scored.values() for row in part]
    assert [(row["row"], row["id"]) for row in rows] == [(k, f"document {k}") for k in range(ROWS) if k != EMPTY]
    assert [row for part in whole.values() for row in part] == rows
    (rejected,) = [row for part in corpora.rejects(user.folder / "scored").values() for row in part]
    assert rejected == {"row": EMPTY, "id": f"document {EMPTY}", "reason": "empty"}
    assert corpora.rejects(user.folder / "whole") == corpora.rejects(user.folder / "scored")
    return rows


def load_without_secateur(user: User, loading: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Uninstall secateur, load the folder by the printed lines, and compare its logits with the scores."""
    user.done("pip", "uninstall", "--quiet", "--yes", "secateur")
    by_row, chosen = {row["row"]: row for row in rows}, range(0, ROWS, 250)
    texts = pyarrow.parquet.read_table(user.folder / "documents.parquet").column("text").to_pylist()
    result = user.done("python", "-c", PLAIN, "\n".join(loading), text=json.dumps([texts[k] for k in chosen]))
    answer = json.loads(result.stdout)
    names = [answer["names"][str(k)] for k in range(len(answer["names"]))]
    probabilities = torch.tensor(answer["logits"], dtype=torch.float64).softmax(dim=1)  # [texts, classes]
    scores = torch.tensor([[by_row[k][f"p_{name}"] for name in names] for k in chosen], dtype=torch.float64)
    torch.testing.assert_close(scores, probabilities, rtol=0, atol=2e-6)
    assert [by_row[k]["label"] for k in chosen] == [names[k] for k in probabilities.argmax(dim=1).tolist()]
    assert len({by_row[k]["label"] for k in chosen}) > 1
