"""Arguments, files and machines at the edge of what commands take: one line, and nothing half-written stays."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from cases import CASES

import secateur
import secateur.cli.app
from secateur.cli import main

Run = Callable[..., tuple[int, str]]
BERT = CASES["bert-sequence"]
DIGITS = "9" * 5000  # More than Python converts into a number.
SMALL = ("--batch-sizes", "1", "--lengths", "4", "--threads", "1")
ATTRIBUTE = ("attribute", "m", "--data", "rows.jsonl", "--out", "o")
PRUNE = ("prune", "m", "--data", "rows.jsonl", "--keep", "0.5", "--recover", "none", "--out", "o", *SMALL)
LAYERS = ("layers", "m", "--data", "rows.jsonl", "--keep-layers", "1", "--out", "o", *SMALL)
GATES = ("layer-gates", "m", "--data", "rows.jsonl", "--keep-layers", "1", "--steps", "1", "--out", "o", *SMALL)
SCORE = ("score", "m", "--data", "rows.jsonl", "--column", "input", "--max-tokens", "64", "--threads", "1", "--out", "o")
BAD_OPTIONS = {
    "no name": ((*ATTRIBUTE, "--out", "."), "out: expected the name of a new file, in UTF-8, got '.'"),
    "empty name": ((*PRUNE, "--out", ""), "out: expected the name of a new folder, in UTF-8, got '.'"),
    "not UTF-8": ((*PRUNE, "--out", "\udcff"), r"out: expected the name of a new folder, in UTF-8, got '\udcff'"),
    "run not UTF-8": ((*GATES, "--out", "\udcff"), r"out: expected the name of a new folder, in UTF-8, got '\udcff'"),
    "meta": ((*ATTRIBUTE, "--device", "meta"), "device: expected one that computes, got 'meta'"),
    "sites": ((*ATTRIBUTE, "--sites", f"ffn.{DIGITS}"), "sites: expected words of encoder, "),
    "align": ((*PRUNE, "--align", DIGITS), "align: expected 'auto' or a positive number, got '999"),
    "max-tokens": ((*SCORE, "--max-tokens", DIGITS), "max-tokens: expected auto or a number of at least 1, got '999"),
    "seed": ((*GATES, "--seed", str(2**32)), "Invalid value for '--seed': "),
    "rate": ((*GATES, "--learning-rate", "inf"), "Invalid value for '--learning-rate': "),
    "gate rate": ((*GATES, "--gate-learning-rate", "inf"), "Invalid value for '--gate-learning-rate': "),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in a folder with a model and examples; returns its exit code and what it says on stderr."""
    monkeypatch.chdir(tmp_path)
    secateur.save(BERT.model(), "m", tokenizer=BERT.task.reader)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BERT.examples))

    def command(*line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *line])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return command


def refused(run: Run, *line: str) -> str:
    """Run a command that must end with exit code 2, one line and no new file; return the line."""
    before = sorted(Path().rglob("*"))
    code, said = run(*line)
    assert code == 2, said
    (message,) = said.splitlines()
    assert sorted(Path().rglob("*")) == before
    return message.removeprefix("secateur: ")


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_is_refused_before_the_work(name: str, run: Run) -> None:
    line, message = BAD_OPTIONS[name]
    assert refused(run, *line).startswith(message)


def test_a_target_of_many_digits(run: Run) -> None:
    Path("rows.csv").write_text(f"input,target\na,{DIGITS}\n")
    assert refused(run, "evaluate", "m", "--data", "rows.csv").startswith("examples, row 1: expected a target among the labels")


def test_a_column_of_no_ascii_digits(run: Run) -> None:
    tokens = CASES["bert-token"]
    secateur.save(tokens.model(), "t", tokenizer=tokens.task.reader)
    Path("tags.conll").write_text("the O\n")
    assert "'²'" in refused(run, "evaluate", "t", "--data", "tags.conll", "--target-column", "²")


@pytest.mark.parametrize("line", [PRUNE, LAYERS, GATES])
def test_a_config_that_transformers_does_not_save(line: tuple[str, ...], run: Run) -> None:
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "output_attentions": True}))
    message = refused(run, *line)
    assert message.startswith("model: 'BertForSequenceClassification' has a config that cannot be saved: ")
    assert "output_attentions" in message


def test_a_folder_without_the_files_of_a_tokenizer(run: Run) -> None:
    Path("m/tokenizer.json").unlink()
    assert refused(run, "evaluate", "m", "--data", "rows.jsonl").startswith("tokenizer: expected 'm' to hold the files of a")


def test_settings_of_a_run_that_are_not_utf8(run: Run) -> None:
    assert run(*SCORE)[0] == 0
    Path("o/settings.json").write_bytes(b"\xff")
    assert "settings.json' is damaged; delete its folder" in refused(run, *SCORE, "--resume")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Exception("No space left on device (os error 28)"), "out: cannot be written: No space left on device (os error 28)"),
        (RuntimeError("basic_ios::clear: iostream error"), "out: cannot be written: basic_ios::clear: iostream error"),
        (
            RuntimeError("Allocator: can't allocate memory"),
            "out of memory: Allocator: can't allocate memory",
        ),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_a_full_disk_and_a_full_memory(error: Exception, message: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**options: object) -> None:
        raise error

    monkeypatch.setattr(secateur.cli.app, "app", app)
    assert run("sites", "m") == (1, f"secateur: {message}\n")


def test_parquet_rows_that_python_has_no_value_for(run: Run) -> None:
    dates = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"input": ["a", "b"], "id": dates}), "rows.parquet")
    assert run(*SCORE, "--data", "rows.parquet", "--id-column", "id")[0] == 0
    assert [json.loads(line)["row"] for line in Path("o/rejects/rows.jsonl").read_text().splitlines()] == [0]
    (row,) = pyarrow.parquet.read_table("o/shards/rows.parquet").to_pylist()
    assert (row["row"], row["id"]) == (1, datetime.datetime(1970, 1, 1))
