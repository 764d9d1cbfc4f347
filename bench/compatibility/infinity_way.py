"""Infinity (infinity-emb): a classifier behind its HTTP API on loopback, compared with the model's own probabilities."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome
from bench.compatibility.pipelines import texts

_SECONDS = 300
# Infinity computes in the folder's dtype, float32. Its batches have other lengths, so sums round differently.
_BOUND = 1e-5


def infinity(folder: Folder) -> Outcome:
    """Serve the folder, and classify 16 texts.

    $INFINITY names the command infinity_emb, in an environment of its own: it needs transformers 4 and NumPy 1.
    """
    program = os.environ.get("INFINITY")
    if program is None:
        return Outcome("not tried", "needs INFINITY, the command infinity_emb of an environment of its own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program, "v2", "--model-id", str(folder.model), "--served-model-name", "pruned", "--engine", "torch", "--device", "cpu",
        "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--no-bettertransformer",
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    log = folder.path / "infinity.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            answers = _answers(server, f"http://127.0.0.1:{port}", texts(folder))
        finally:
            server.terminate()
            server.wait()
    if answers is None:
        return Outcome("fails", f"Infinity does not start: {_last_error(log)}")
    return _compared(folder, answers)


def _answers(server: subprocess.Popen[bytes], address: str, asked: list[str]) -> list[Any] | None:
    """Return the labels with scores of each text; None if the server ends before it answers."""
    deadline = time.monotonic() + _SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).read()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
            continue
        body = json.dumps({"model": "pruned", "input": asked, "raw_scores": False}).encode()
        request = urllib.request.Request(f"{address}/classify", body, {"content-type": "application/json"})
        answers: list[Any] = json.loads(urllib.request.urlopen(request, timeout=_SECONDS).read())["data"]
        return answers
    return None


def _compared(folder: Folder, answers: list[Any]) -> Outcome:
    """Compare all labels' scores with the model's probabilities."""
    model: Any = folder.load()
    tokenizer = folder.tokenizer()
    largest = 0.0
    for text, answer in zip(texts(folder), answers, strict=True):
        with torch.inference_mode():
            probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        for entry in answer:
            largest = max(largest, abs(entry["score"] - float(probabilities[model.config.label2id[entry["label"]]])))
    same = largest <= _BOUND
    measured = {"probability_difference": largest}
    return Outcome("works" if same else "fails", f"POST /classify: probabilities within {largest:.1e}", measured)


def _last_error(log: Path) -> str:
    """Return the last line of the log that names an error, and secateur's own if there is one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error: " in line]
    own = [line for line in lines if "expected" in line]
    return [*lines, *own][-1][:240] if lines else "no message"
