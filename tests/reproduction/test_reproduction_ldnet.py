"""The reproduction of LD-Net: its grid, killed and resumed runs, claims, figures, and measurements of taggers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run, assert_refused
from figure_facts import assert_readable, figures_of, limits
from ldnet_toys import LM_CONFIG, sentences, vocabulary, write_columns, write_text

from secateur.learned.ldnet.deletion import delete_closed, flops_per_word
from secateur.learned.ldnet.run import Stage, new_tagger, tagger_without_lm, train_stage
from secateur.learned.ldnet.tagging import evaluate
from secateur.reproduction.ldnet import figures as ldnet_figures
from secateur.reproduction.ldnet.claims import claims
from secateur.reproduction.ldnet.figures import draw
from secateur.reproduction.ldnet.grid import MEASURES, NO_LM, WITH_DROPOUT, Cell, Settings, grid
from secateur.reproduction.ldnet.measuring import detached, interleaved_words_per_second
from secateur.reproduction.ldnet.report import lines
from secateur.reproduction.ldnet.results import Results
from secateur.support.ledger import CELLS

SETTINGS = Settings(
    files={"data": ("train", 1), "eval": ("dev", 1), "test": ("test", 1)},
    columns={"ner": "4", "chunk": "3"},
    wanted=(1, 4),
    layers=2,
)
SIZES = {"features": 8, "word_width": 8, "hidden": 8}
SMALL = (
    "--data train.conll --eval dev.conll --target-column tag=3 --layers 2 --width 8 --steps 8 --epochs 1 --prune-epochs 2 "
    "--wanted 1 --lambda0 1 --gate-learning-rate 0.5 --examples 30 --threads 1"
)


@pytest.fixture
def files(run: Run) -> Path:
    """The folder that the commands run in, with the files that they read."""
    write_columns(Path("train.conll"))
    write_columns(Path("dev.conll"), 12, seed=1)
    Path("rare").write_text("once and twice\n")
    return Path.cwd()


def made_up(dropout_helps: bool = True, speed: float = 3.9) -> list[dict[str, Any]]:
    """Invent runs: pruning to a quarter of the FLOPs costs two points of F1, or nothing with layer dropout."""
    rows = []
    for cell in grid(SETTINGS):
        row: dict[str, Any] = {**cell.to_json(), **dict.fromkeys(MEASURES), "seconds": 1.0}
        good = (cell.lm == WITH_DROPOUT) == dropout_helps
        if not cell.task:
            row |= {"perplexity_forward": 100.0, "perplexity_backward": 90.0}
        else:
            small = cell.wanted == 1
            value = {NO_LM: 0.7}.get(cell.lm, 0.8) - (0.02 if small and not good else 0.0)
            row |= dict.fromkeys(("dev", "dev_low", "dev_high", "test", "test_low", "test_high"), value)
            row |= {"metric": "F1", "layers": cell.wanted or 4, "flops": 10_000_000 if small else 40_000_000, "lm_flops": 1}
        if cell.task and cell.wanted is not None:
            row |= {"words_per_second": 1000 * speed, "whole_words_per_second": 1000.0, "speedup": speed}
            row["gates"] = [[0.9, 0.8, 0.7, 0.6], [0.5, 0.0, 0.0, 0.0]]
        elif cell.task and cell.lm != NO_LM:
            row["detached"] = [[left, 0.8 - (4 - left) * (0.01 if good else 0.1)] for left in range(4, -1, -1)]
        rows.append(row)
    return rows


def test_the_grid_has_each_run_once_and_after_what_it_needs() -> None:
    cells = grid(SETTINGS)
    assert len(cells) == len(set(cells)) == 2 + 2 * 3 + 2 * (2 + 1)
    assert len({cell.folder for cell in cells}) == len(cells)
    place = {cell: number for number, cell in enumerate(cells)}
    for cell in cells:
        if cell.task and cell.lm != NO_LM:
            assert place[Cell(cell.lm)] < place[cell]
        if cell.wanted == 4:
            assert cell.lm == WITH_DROPOUT  # The control.
        if cell.wanted is not None:
            assert place[Cell(cell.lm, cell.task)] < place[cell]


def test_settings_go_through_json() -> None:
    assert Settings.from_json(json.loads(json.dumps(SETTINGS.to_json()))) == SETTINGS


def test_claims_that_hold_and_that_do_not() -> None:
    checked = claims(Results(made_up(), SETTINGS))
    assert len(checked) == 2 * 8
    assert [claim.claim for claim in checked if not claim.held] == [
        f"{task}: FLOPs a word shrink 5 times or more" for task in ("ner", "chunk")
    ]
    worse = claims(Results(made_up(dropout_helps=False, speed=3.3), SETTINGS))
    # 3.3 is less than 85% of 4, and only the claims that the models help and that gates close are left.
    assert [claim.held for claim in worse] == 2 * [True, True, False, False, False, False, False, False]
    assert "80.00 to 78.00" in worse[2].ours
    without_control = claims(Results(made_up(), replace(SETTINGS, wanted=(1,))))
    assert len(without_control) == 2 * 7  # Nothing was trained on with all layers.


def test_a_csv_says_what_the_cells_said(tmp_path: Path) -> None:
    rows = made_up()
    with open(tmp_path / "cells.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = {"lm", "task", "metric", "gates", "detached"}
    with open(tmp_path / "cells.csv", newline="") as file:
        read = [
            {name: value if name in words else float(value) if value else None for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
    assert list(lines(Results(read, SETTINGS), [])) == list(lines(Results(rows, SETTINGS), []))
    assert claims(Results(read, SETTINGS)) == claims(Results(rows, SETTINGS))
    assert draw(Results(read, SETTINGS), {"device": "CPU"}) == draw(Results(rows, SETTINGS), {"device": "CPU"})


def test_figures_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(made_up(), SETTINGS)
    figures = figures_of(monkeypatch, ldnet_figures)
    drawn = draw(results, {"device": "CPU (x86_64)"})
    gates, layers = figures
    assert_readable(gates, ("LD-Net", "CPU (x86_64)"), ("no error bars",))
    assert_readable(layers, ("LD-Net", "CPU (x86_64)"), ("error bars: 95% intervals",))
    assert set(limits(gates)) == {(-0.03, 1.03)}
    assert len(set(limits(layers))) == 1
    assert all(len(axes.texts) == 2 * SETTINGS.layers for axes in gates.axes)  # Each line has its name.
    assert set(drawn) == {"gates.png", "layers.png"}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    text = "\n".join(lines(results, claims(results), images="ldnet-"))
    assert "| layer dropout | 100.0 | 90.0 |" in text
    assert "| no layer dropout | 1 | 1 | 78.00 [78.00, 78.00] | 78.00 [78.00, 78.00] | 10.00 | 3,900 | 3.90x |" in text
    assert "](ldnet-layers.png)" in text


def tagger_of(path: Path) -> Any:
    torch.manual_seed(0)
    words = vocabulary(write_text(path / "text"))
    return new_tagger(LM_CONFIG.build(len(words)), words, sentences(40), "bioes", **SIZES)


def test_detached_layers_are_taken_out_one_by_one(tmp_path: Path) -> None:
    tagger, rows = tagger_of(tmp_path), sentences(40)
    train_stage(tagger, rows, rows[:4], Stage(8, 4, 0.1), tmp_path / "c", "cpu")
    measured = detached(tagger, rows[:20], 2, seed=0)
    assert [left for left, _ in measured] == [4, 3, 2, 1, 0]
    assert torch.equal(tagger.all_gates, torch.ones(4))
    assert measured[0][1] == evaluate(tagger, rows[:20]).value > 0.5
    with torch.no_grad():
        for gates in tagger.gates:
            gates.zero_()
    assert measured[-1][1] == evaluate(tagger, rows[:20]).value


def test_words_a_second_of_a_tagger_and_a_smaller_one(tmp_path: Path) -> None:
    tagger = tagger_of(tmp_path)
    with torch.no_grad():
        for gates in tagger.gates:
            gates.zero_()
    small = delete_closed(tagger)
    tokens = [sentence.tokens for sentence in sentences(20)]
    before, after, ratio = interleaved_words_per_second(tagger, small, tokens, 15)
    assert min(before, after) > 100
    assert ratio > 1  # Four LSTMs less of six.
    assert not tagger.training


def test_a_tagger_without_language_models_learns(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    rows = sentences(40)
    tagger = tagger_without_lm(rows, "bioes", **SIZES)
    assert flops_per_word(tagger)["language models"] == 0
    log, _ = train_stage(tagger, rows, rows, Stage(8, 4, 0.1), tmp_path / "c", "cpu")
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert not [warning for warning in recwarn if "zero-element" in str(warning.message)]


def test_a_killed_run_gives_the_same_table(run: Run, files: Path) -> None:
    """The run is killed twice: while it trains language models, and while it trains a tagger."""
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "reproduce", "ldnet", "--out", "killed"]
    for reached in (
        lambda: list(files.glob("killed/checkpoints-*/checkpoint-*/trainer_state.json")),
        lambda: _cells(files) > 2,
    ):
        process = subprocess.Popen(
            [*command, *SMALL.split(), "--resume"], cwd=files, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not reached():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 2 < _cells(files) < 7
    assert run(f"reproduce ldnet --out killed {SMALL} --json --resume").code == 0
    whole = run(f"reproduce ldnet --out whole {SMALL} --json").document
    assert whole["cells"] == 2 + 3 + 2
    timed = ("seconds", "words_per_second", "whole_words_per_second", "speedup")
    tables = [json.loads((files / name / "cells.json").read_text())["cells"] for name in ("killed", "whole")]
    killed, clean = ([{name: value for name, value in row.items() if name not in timed} for row in table] for table in tables)
    assert killed == clean
    assert not list((files / "killed").glob("checkpoints-*"))
    names = {path.name for path in (files / "whole").iterdir()}
    assert {"cells.csv", "cells.json", "gates.png", "layers.png", "report.md"} <= names
    pruned = [row for row in clean if row["wanted"] == 1]
    assert all(len(z) == 4 and all(0 <= gate <= 1 for gate in z) for row in pruned for z in row["gates"])
    assert all(row["layers"] == sum(gate > 0 for gate in row["gates"][-1]) for row in pruned)
    assert (files / "whole" / "text.txt").read_text().splitlines()[0] == " ".join(sentences(1)[0].tokens)


def _cells(folder: Path) -> int:
    path = folder / "killed" / CELLS
    return path.read_bytes().count(b"\n") if path.exists() else 0


BAD = [
    ("--target-column tag", "target-column: expected NAME=COLUMN, each name once, got 'tag'"),
    ("--target-column tag=3 --target-column tag=2", "target-column: expected NAME=COLUMN, each name once, got 'tag=2'"),
    ("--target-column ../t=3", "target-column: expected NAME=COLUMN, each name once, got '../t=3'"),
    ("--target-column tag=7", "column: expected a number from 1 to 3, the columns of 'train.conll', got 7"),
    ("--target-column tag=2", "data: 'train.conll', line 1: expected O, or B-, I-, E- or S- with a type"),
    ("--target-column tag=3 --preset large", "preset: expected small or paper, got 'large'"),
    ("--target-column tag=3 --wanted none", "wanted: expected numbers between commas, got 'none'"),
    ("--target-column tag=3 --wanted 20", "wanted: expected numbers up to 20, one of them below it, got '20'"),
    ("--target-column tag=3 --wanted 2,21", "wanted: expected numbers up to 20, one of them below it, got '2,21'"),
    ("--target-column tag=3 --lambda0 -1", "lambda0: expected at least 0, got -1.0"),
    ("--target-column tag=3 --epochs 0", "epochs: expected a number above 0, got 0.0"),
    ("--target-column tag=3 --text rare", "text: expected words that occur at least 3 times, got none"),
    ("--target-column tag=3 --text nowhere", "data: no such file: 'nowhere'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_input_is_one_line(run: Run, files: Path, options: str, message: str) -> None:
    result = run(f"reproduce ldnet --data train.conll --eval dev.conll --out d {options}")
    assert_refused(result, message, files / "d")


def test_claims_are_undecided_where_intervals_overlap() -> None:
    ends = (("low", -0.2), ("high", 0.2))
    wide = [{**row, **{f"{s}_{end}": (row[s] or 0) + by for s in ("dev", "test") for end, by in ends}} for row in made_up()]
    checked = claims(Results(wide, SETTINGS))
    undecided = {claim.claim.partition(": ")[2] for claim in checked if claim.verdict == "undecided"}
    assert len(undecided) == 4
    assert not any("FLOPs" in text or "R3 closes" in text for text in undecided)  # Counts leave no doubt.
