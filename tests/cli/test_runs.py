"""Outputs are checked before the work, one process makes an output, numbers are bounded, and Ctrl-C ends in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import CASES
from command import Run, assert_refused

import secateur
from secateur.measuring.latency import latency_table
from secateur.support.files import claimed

CASE = CASES["bert-sequence"]
POSITIONS = "lengths: expected at most the model's 40 positions"
# None of these models exists: a check of the output that came later would not be reached.
WITH_OUT = (
    "attribute ./none --data d.jsonl",
    "plan none.safetensors --keep 0.5",
    "prune ./none --data d.jsonl --keep 0.5",
    "sweep ./none --data d.jsonl --eval d.jsonl",
    "layers ./none --data d.jsonl --keep-layers 1",
    "benchmark ./none ./none",
    "demo",
    "score ./none --data d.jsonl",
    "layer-gates ./none --data d.jsonl --keep-layers 1",
    "multitask none.yaml",
    "ldnet train-lm none.txt",
    "ldnet train-tagger none --data d.conll --eval d.conll --target-column 2",
    "reproduce ap",
    "reproduce multitask",
    "reproduce ldnet --data d.conll --eval d.conll --test d.conll --text t.txt --target-column ner=2",
)


@pytest.mark.parametrize("line", WITH_OUT)
def test_an_output_that_cannot_be_written_is_found_before_the_work(run: Run, line: str) -> None:
    result = run(f"{line} --out /proc/self/new")
    assert_refused(result, "out: expected a folder that can be written to, got '/proc/self'", "/proc/self/new")


def saved() -> None:
    """Write the model "m" and its examples."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    rows = [{"input": row["input"], "target": row["target"]} for row in CASE.examples]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_two_runs_into_one_output_the_second_is_refused(run: Run) -> None:
    saved()
    with claimed("s", "file"):
        # The lock is this process's. A second open file of the same process is refused like another process.
        for line in ("attribute m --data d.jsonl --out s", "sweep m --data d.jsonl --eval d.jsonl --out s"):
            assert_refused(run(line), "out: 's' is in use by another process", "s")
    assert run("attribute m --data d.jsonl --out s").code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["d.jsonl", "m", "s", "test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attribute m --data d.jsonl --threads 1000000 --out o", "threads: expected 1 to "),
        ("score m --data d.jsonl --column input --threads 1000000 --out o", "threads: expected 1 to "),
        (
            "prune m --data d.jsonl --keep 0.5 --rounds 100000000000000 --out o",
            "rounds: expected at most 1000, got 1000",
        ),
        (
            "prune m --data d.jsonl --keep 0.5 --lengths 8,41 --out o",
            "lengths: expected at most the model's 40 positions, got 41",
        ),
        ("layers m --data d.jsonl --keep-layers 1 --lengths 41 --out o", POSITIONS),
        (
            "layer-gates m --data d.jsonl --keep-layers 1 --lengths 41 --out o",
            POSITIONS,
        ),
        ("sweep m --data d.jsonl --eval d.jsonl --length 41 --out o", POSITIONS),
        ("benchmark m m --lengths 41 --out o", POSITIONS),
        ("attribute m --data pipe.jsonl --out o", "data: expected a file, got the pipe 'pipe.jsonl'"),
        (
            "attribute m --data d.jsonl --checkpoint /proc/self/c --out o",
            "checkpoint: expected a folder that can be written to",
        ),
        ("score m --data pipe.jsonl --out o", "data: no such file: 'pipe.jsonl'"),
        ("prune m --data d.jsonl --keep 0.5 --dry-run --lengths 41", "length"),
        ("score m --data d.jsonl --out s3://bucket/o", "out: 's3://bucket/o' cannot be opened: "),
        ("score m --data d.jsonl --out nowhere://bucket/o", "out: 'nowhere://bucket/o' cannot be opened: "),
    ],
)
def test_bounds_are_one_line(run: Run, line: str, message: str) -> None:
    saved()
    os.mkfifo("pipe.jsonl")
    if "s3://" in line and __import__("importlib.util").util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    assert_refused(run(line), message, "o")


@pytest.mark.parametrize("line", ["sites m", "prune m --data d.jsonl --keep 0.5 --out o", "score m --data d.jsonl --out o"])
def test_a_config_of_ten_million_layers(run: Run, line: str) -> None:
    saved()
    path = Path("m/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10_000_000}))
    result = run(line)
    assert_refused(result, "model: ", "o")
    assert "num_hidden_layers: expected at most 10000, got 10000000" in result.errors[-1]


def test_a_latency_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    table = latency_table(CASE.model(), batch_size=1, length=4, widths=(1.0,), pairs=1, seconds=0.0)
    assert table.total > 0
    (message,) = caplog.messages
    assert message.startswith("the latency table is not kept: /proc/self/secateur/latency/")


# The last read of the corpus waits for ever, as a file system without an answer does.
BLOCKED = """
import os
import secateur.corpus.sources as sources
read = sources.Source.read
def blocked(source, *arguments):
    yield from read(source, *arguments)
    open("blocked", "w").close()
    os.read(os.pipe()[0], 1)
sources.Source.read = blocked
from secateur.cli import main
main()
"""


def test_an_interrupt_is_heard_while_a_read_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved()
    Path("text.txt").write_text("the cat sat\n" * 3000)
    line = "score m --data text.txt --threads 1 --max-tokens 64 --dtype float32 --compile off --out o"
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, *line.split()], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not Path("blocked").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "secateur: interrupted"
    assert "Traceback" not in errors
    assert not list(Path("o").rglob("*.partial"))
    assert not list(Path("o").rglob("*.parquet"))
