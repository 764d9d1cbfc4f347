"""The reproduction of multitask pruning: its grid, killed and resumed runs, claims, figures, and the paper's preset."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from command import Run, assert_refused
from encoder_rows import pair_tokenizer, rows_of, write
from figure_facts import assert_readable, figures_of, limits

from secateur.learned.multitask.model import encoder_of
from secateur.reproduction.multitask import figures as multitask_figures
from secateur.reproduction.multitask.claims import claims
from secateur.reproduction.multitask.encoder_sets import SETS, THREE
from secateur.reproduction.multitask.figures import draw
from secateur.reproduction.multitask.grid import ATTRIBUTION, EXPERIMENTS, MAGNITUDE, Cell, Settings, grid
from secateur.reproduction.multitask.report import lines
from secateur.reproduction.multitask.results import Results
from secateur.support.ledger import CELLS

SETTINGS = Settings(
    model="m",
    tasks=("a", "b"),
    experiments=tuple(EXPERIMENTS),
    densities={"element": (0.1, 0.4), "rank": (0.2, 0.6)},
    single_densities={"element": (0.05, 0.2, 0.1), "rank": (0.1, 0.3)},
    low_density=0.4,
)
SMALL = "--tasks movie,domain --experiments low-resource --steps 2 --examples 24 --tested 12 --threads 1"


def test_the_grid_has_each_run_once() -> None:
    cells = grid(SETTINGS)
    assert len(cells) == len(set(cells))
    assert cells[0] == Cell(("a", "b"))  # The dense model, which attribution scores come from.
    shared = 8 * 2
    single = 2 * (3 + 2 + 1)
    low = 2 * 2 * 2
    started = 2 * 2
    assert len(cells) == 1 + shared + single + low + 2 * started
    counts = Counter(cell.scores for cell in cells)
    assert counts[ATTRIBUTION] == counts[MAGNITUDE] == started
    assert {cell.low for cell in cells if len(cell.tasks) == 1} == {"", "a", "b"}
    assert len(grid(replace(SETTINGS, experiments=("settings",)))) == 1 + shared


def test_settings_and_cells_go_through_json() -> None:
    assert Settings.from_json(json.loads(json.dumps(SETTINGS.to_json()))) == SETTINGS
    assert Cell(("a", "b"), low="a").to_json()["tasks"] == "a+b"


def made_up(shared: float, low: float, attributed: float) -> list[dict[str, Any]]:
    """Invent runs: denser models score more, movement and global scope a little more.

    shared, low, attributed: what sharing, sharing with few examples, and attribution add to the score.
    """
    rows = []
    for cell in grid(SETTINGS):
        value = 0.5 + 0.3 * cell.density + 0.01 * (cell.method == "movement") + 0.02 * (cell.scope == "global")
        value += (low if cell.low else shared) * (len(cell.tasks) > 1) + attributed * (cell.scores == ATTRIBUTION)
        values = {f"value_{task}": value if task in cell.tasks else None for task in SETTINGS.tasks}
        rows.append({**cell.to_json(), **values, "mean": value})
    return rows


def test_claims_that_hold_and_that_do_not() -> None:
    checked = claims(Results(made_up(shared=0.2, low=0.1, attributed=0.05), SETTINGS))
    # Movement, two scopes, two mixtures, few examples dense and pruned, attribution against zero and magnitude twice.
    assert len(checked) == 1 + 2 + 2 + 2 + 4
    assert [claim.claim for claim in checked if not claim.held] == [
        "element-wise magnitude at 0.1: local scope keeps more than global"
    ]
    worse = claims(Results(made_up(shared=-0.2, low=-0.1, attributed=-0.05), SETTINGS))
    assert sum(claim.held for claim in worse) == 2  # Those within the eight settings.


def test_the_mixture_shares_a_budget() -> None:
    results = Results(made_up(0.0, 0.0, 0.0), SETTINGS)
    setting = ("movement", "element", "global")
    mixture = results.mixture(setting, 0.25)
    assert mixture is not None
    assert mixture.weights == pytest.approx(0.25)  # 0.2 of one task's encoder and 0.05 of the other's.
    assert mixture.score == pytest.approx(0.53 + 0.3 * (0.2 + 0.05) / 2)
    assert results.mixture(setting, 0.08) is None
    assert results.mixture(("movement", "rank", "local"), 1.0) is None  # Not run.


def test_figures_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(made_up(0.1, 0.1, 0.1), SETTINGS)
    figures = figures_of(monkeypatch, multitask_figures)
    drawn = draw(results, {"device": "CPU (x86_64)"})
    for figure in figures:
        assert_readable(figure, (SETTINGS.model, *SETTINGS.tasks, "CPU (x86_64)"), ("one training run", "no error bars"))
        assert len(set(limits(figure))) == 1
    assert set(drawn) == {f"{name}.png" for name in EXPERIMENTS}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    text = "\n".join(lines(results, claims(results)))
    assert "| movement, global | 0.660 | 0.750 |" in text
    assert "| dense | 0.900 | 0.900 |" in text


def test_a_killed_run_gives_the_same_table(run: Run, tmp_path: Path) -> None:
    """The run is killed twice, at an arbitrary point."""
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "reproduce", "multitask", "--out", "killed"]
    for finished in (1, 4):
        process = subprocess.Popen([*command, *SMALL.split(), "--resume"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        cells = tmp_path / "killed" / CELLS
        while process.poll() is None and (not cells.exists() or cells.read_bytes().count(b"\n") < finished):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run(f"reproduce multitask --out killed {SMALL} --json --resume").code == 0
    whole = run(f"reproduce multitask --out whole {SMALL} --json").document
    assert whole["cells"] == 1 + 2 * 4
    killed, clean = (json.loads((tmp_path / name / "cells.json").read_text()) for name in ("killed", "whole"))
    for document in (killed, clean):
        for cell in document["cells"]:
            del cell["seconds"]
    assert killed["cells"] == clean["cells"]
    assert killed["claims"] == clean["claims"] == whole["claims"]
    assert not list((tmp_path / "killed").glob("checkpoints-*"))


BAD = [
    ("--tasks movies", "tasks: expected some of domain, language, movie, qtype, sentiment, got 'movies'"),
    ("--tasks movie", "tasks: expected at least two, got 'movie'"),
    ("--experiments speed", "experiments: expected some of settings, mixture, low-resource, initial-scores, got 'speed'"),
    ("--densities .1,many", "densities: expected numbers between commas, got '.1,many'"),
    ("--densities 0,.1", "densities: expected shares in (0, 1], got '0,.1'"),
    ("--preset original", "preset: expected builtin, paper or paper-nine, got 'original'"),
    ("--preset paper --data-root nowhere", "data-root: no such file: 'nowhere/mnli/train'"),
    ("--model ./bert", "model: no such model folder: './bert'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_input_is_one_line(run: Run, tmp_path: Path, options: str, message: str) -> None:
    result = run(f"reproduce multitask --out d {options}")
    assert_refused(result, message, tmp_path / "d")


def test_the_papers_preset_runs_on_local_copies(run: Run, tmp_path: Path) -> None:
    for name in THREE:
        for split in ("train", SETS[name].evaluation):
            write(tmp_path / "sets", name, split, rows_of(name, 12))
    encoder: Any = encoder_of(CASES["bert-sequence"].model())
    encoder.save_pretrained(tmp_path / "bert")
    pair_tokenizer().save_pretrained(tmp_path / "bert")
    options = "--preset paper --data-root sets --model bert --steps 1"
    result = run(f"reproduce multitask --out d {options} --experiments low-resource,initial-scores --json")
    assert result.code == 0, result.errors
    with open(tmp_path / "d" / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["tasks"] for row in rows} == {"mnli+qqp+squad", *THREE}
    reached = {(row["granularity"], row["density"]): float(row["reached"]) for row in rows}
    assert reached["element", "0.3"] == pytest.approx(0.3, abs=1e-4)
    assert 0 < reached["rank", "0.226"] <= 0.226
    rows = rows_of("mnli", 12)
    write(tmp_path / "sets", "mnli", "train", [*rows[:11], {**rows[11], "premise": "the cat sat"}])
    result = run(f"reproduce multitask --out d --resume {options} --experiments low-resource,initial-scores --json")
    assert result.code == 2
    assert result.errors[-1].startswith("secateur: rows: 'd' was begun with '")
    assert result.errors[-1].endswith("'; the examples have changed: give the former ones, or a new folder")
    result = run(f"reproduce multitask --out e {options} --experiments low-resource --densities .5 --learning-rate 1e-4 --json")
    settings = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert settings["densities"] == {"element": [0.5], "rank": [0.5]}
    assert settings["rates"]["weights"] == 1e-4
