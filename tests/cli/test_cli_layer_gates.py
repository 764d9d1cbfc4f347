"""`secateur layer-gates`: the files of a run, killed and resumed runs, and exit code 2 with one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command import Run, assert_refused, killed_in, same_weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tagged import CASE as TAGGER
from tagged import saved, written

import secateur

LINE = (
    "layer-gates builtin --data train.jsonl --examples 16 --keep-layers 3 --batch-size 4 --threads 1 --batch-sizes 1 "
    "--lengths 8"
)
FAST = "--gate-learning-rate 1 --strength 3"


def test_a_run_and_the_same_command_again(run: Run) -> None:
    line = f"{LINE} {FAST} --steps 8 --eval test.jsonl --out r --json"
    result = run(line)
    assert result.code == 0, result.errors
    document = result.document  # stdout holds exactly one JSON document, or parsing fails.
    z, gone = document["z"], document["deleted"]
    assert isinstance(z, dict)
    assert isinstance(gone, list)
    assert len(z) == 7
    assert gone == [name for name, value in z.items() if value == 0]
    assert len(gone) == 4
    training = document["training"]
    assert isinstance(training, dict)
    assert training["step"] == list(range(1, 9))
    assert training["z"].keys() == z.keys()
    assert {name for name in gone if training["z"][name][-1] > 0} == set(document["closed at the end"])
    assert document["verification"]["holds"] is True
    report = json.loads(Path("r/model/report.json").read_text())
    assert document == {"out": "r", "model": "builtin", **report}
    assert sorted(path.name for path in Path("r").iterdir()) == ["cells.jsonl", "model", "run.yaml", "settings.json"]
    for plot in ("gates.png", "benchmark.png"):
        assert Path("r/model", plot).read_bytes().startswith(b"\x89PNG")
    assert secateur.load("r/model").dtype == torch.float16  # The dense model's stored dtype.
    evaluated = run("evaluate r/model --data test.jsonl --json").document
    assert evaluated["value"] == document["evaluation"]["pruned"]["value"]
    before = Path("r/model/model.safetensors").stat().st_mtime_ns
    assert run(f"{line} --resume").document == document
    assert Path("r/model/model.safetensors").stat().st_mtime_ns == before
    assert_card_and_usage(run, line, gone)
    refused = run(f"{line} --seed 1 --resume")
    assert refused.code == 2
    assert refused.errors[-1] == "secateur: seed: 'r' was begun with 0, got 1"


def assert_card_and_usage(run: Run, line: str, gone: list[str]) -> None:
    """Check the folder's card, and run the lines that end the command."""
    shown = run(f"{line} --resume".replace(" --json", "")).out.splitlines()
    assert "written to r/model" in shown
    python = [text.strip() for text in shown[shown.index("load it:") + 1 :][:3]]
    names: dict[str, Any] = {}
    exec("\n".join(python), names)
    expected = secateur.load("r/model").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in names["model"].state_dict().items())
    command = shown[shown.index("score with it:") + 1].strip()
    Path("documents").mkdir()
    texts = [json.loads(row)["input"] for row in Path("test.jsonl").read_text().splitlines()[:4]]
    pq.write_table(pa.table({"text": texts}), "documents/a.parquet")
    assert run(command.removeprefix("secateur ").replace("'", "") + " --compile off --threads 1 --max-tokens 256").code == 0
    card = ModelCard.load("r/model/README.md")
    assert f"```sh\nsecateur {line.replace('--json', '').strip().split(' --')[0]}" in card.text
    assert "\n".join(python) in card.text
    assert command in card.text
    assert all(name in card.text for name in gone)
    assert "On `test.jsonl`, n = 48." in card.text
    assert "run.yaml" not in card.text  # It is in the folder above, which an upload of this one leaves behind.
    for plot in ("gates.png", "benchmark.png"):
        assert f"({plot})" in card.text


def test_a_killed_run_is_resumed(run: Run) -> None:
    line = f"{LINE} {FAST} --steps 12 --drop 0.2"
    killed_in(Path.cwd(), f"{line} --out broken", "broken/checkpoints")
    assert not Path("broken/model").exists()
    assert_refused(run(f"{line} --out broken"), "out: 'broken' was begun already; add --resume to continue it", "broken/model")
    for folder in ("broken", "whole"):
        assert run(f"{line} --out {folder} --resume").code == 0
    assert same_weights(Path("broken/model"), Path("whole/model"))
    courses = [json.loads(Path(folder, "model/report.json").read_text())["training"] for folder in ("broken", "whole")]
    assert courses[0] == courses[1]


def test_frozen_weights_stay(run: Run) -> None:
    """A tagger on a column file: the remaining weights are unchanged, except out-projections with folded gates."""
    saved(TAGGER.model())
    written("rows.txt", [{"tokens": ["a", "cat", "sat"], "tags": ["O", "B-PER", "I-PER"]}] * 8)
    result = run(
        "layer-gates m --data rows.txt --target-column 3 --input-column 2 --keep-layers 2 --unit branch --frozen --steps 4 "
        f"--batch-size 2 --batch-sizes 1 --lengths 8 {FAST} --out r"
    )
    assert result.code == 0, result.errors
    assert result.out.count(" deleted\n") == 2
    dense, selected = (load_file(Path(folder, "model.safetensors")) for folder in ("m", "r/model"))
    same = [name for name in selected if torch.equal(selected[name], dense[name])]
    changed = {name for name in selected if name not in same and selected[name].shape == dense[name].shape}
    assert len(same) > len(selected) / 2
    assert all(".output.dense." in name for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep-layers 8", "keep_layers: expected a number from 1 to the model's 7, got 8"),
        ("--strength -1", "strength: expected a number of at least 0, got -1.0"),
        ("--drop 1", "drop: expected a share in [0, 1), got 1.0"),
        ("--warmup 2", "warmup: expected a share in [0, 1), got 2.0"),
        ("--unit head", "unit: expected some of block, branch, got 'head'"),
        ("--labels fine,dull", "examples, row 1: expected a target among the labels 'fine', 'dull'"),
        ("--eval other.jsonl", "examples, row 1: expected a target among the labels 'bad', 'good'"),
        ("--data none.jsonl", "data: no such file: 'none.jsonl'"),
        ("--out full", "out: expected a new folder or one that this command began, got 'full'"),
        ("--steps 0", "Invalid value for '--steps'"),
    ],
)
def test_bad_input_is_one_line(run: Run, options: str, message: str) -> None:
    Path("full").mkdir()
    Path("full/precious").touch()
    Path("other.jsonl").write_text(json.dumps({"input": "movie review: fine", "target": "dull"}) + "\n")
    result = run(f"{LINE} --out r {options}")
    assert_refused(result, message, "r")
    assert [path.name for path in Path("full").iterdir()] == ["precious"]
