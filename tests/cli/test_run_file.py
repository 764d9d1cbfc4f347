"""--config: options from a YAML file, and the file in an output folder that repeats its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from command import Run, same_weights

from secateur.support.command import RUN_FILE

PRUNE = "prune builtin --data train.jsonl --labels bad,good --examples 8 --keep 0.5 --allocation uniform --recover none"
FAST = "--batch-sizes 1 --lengths 8"


def test_the_run_file_of_a_folder_repeats_the_command(run: Run) -> None:
    assert run(f"{PRUNE} {FAST} --out first").code == 0
    options = yaml.safe_load(Path("first", RUN_FILE).read_text())
    assert options["command"] == "prune"
    assert options["model"] == "builtin"
    assert options["keep"] == 0.5
    assert options["batch-sizes"] == "1"
    assert options["per-head"] is False
    assert "flops" not in options
    assert "config" not in options
    assert run(f"prune --config first/{RUN_FILE} --out second").code == 0
    assert same_weights(Path("first"), Path("second"))
    assert yaml.safe_load(Path("second", RUN_FILE).read_text()) == {**options, "out": "second"}


def test_a_dry_run_leaves_no_run_file(run: Run) -> None:
    Path("out").mkdir()
    assert run("prune builtin --dry-run --keep 0.5 --batch-sizes 1 --lengths 8 --out out").code == 0
    assert not list(Path("out").iterdir())


def test_options_of_the_command_line_win_and_lists_are_taken(run: Run) -> None:
    Path("options.yaml").write_text(
        "model: builtin\ndata: test.jsonl\nlabels: [bad, good]\nexamples: 2\nmax-tokens: 999\njson: true\n"
    )
    assert run("evaluate --config options.yaml").document["examples"] == 2
    assert run("evaluate --config options.yaml --examples 4").document["examples"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("flop: 0.5", "config: expected some of model, data, .* in 'options.yaml', got 'flop'"),
        ("command: score", "config: expected options of evaluate in 'options.yaml', got those of 'score'"),
        ("- a\n- b", r"config: expected options by name in 'options.yaml', got \['a', 'b'\]"),
        ("labels: {a: 1}", "config: expected a number, a text or a list of them for labels, got {'a': 1}"),
        ("json: 3", "config: expected true or false for json, got 3"),
        ("model: builtin\ndata: x\nmax-tokens: many", "Invalid value for '--max-tokens'"),
        ("model: builtin\ndata: x\nmax-tokens: 0", "Invalid value for '--max-tokens'"),
        ("a: [", "config: 'options.yaml' is no YAML: while parsing"),
        ("model: builtin\ndata: null", "Missing option '--data'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(content: str, message: str, run: Run) -> None:
    Path("options.yaml").write_text(content)
    result = run("evaluate --config options.yaml")
    assert (result.code, len(result.errors)) == (2, 1)
    assert re.search(message, result.errors[0])


def test_a_file_that_is_not_there_is_refused(run: Run) -> None:
    assert run("evaluate --config none.yaml").errors == ["secateur: config: no such file: 'none.yaml'"]
    assert run("evaluate --config .").errors == ["secateur: config: expected a file, got the folder '.'"]
