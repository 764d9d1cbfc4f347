"""The reproduction of attribution-based pruning: its grid, killed and resumed runs, data sets, claims and figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from command import Run, assert_refused
from figure_facts import assert_readable, figures_of

from secateur import InputError
from secateur.reproduction.ap import claims as claims_of_paper
from secateur.reproduction.ap import figures as ap_figures
from secateur.reproduction.ap import glue
from secateur.reproduction.ap.figures import draw
from secateur.reproduction.ap.grid import EXPERIMENTS, Settings, balanced, grid
from secateur.reproduction.ap.results import Results
from secateur.reproduction.shared.claim import Estimate, averaged, claims_table, combined, verdicts
from secateur.support.ledger import CELLS, Ledger

SETTINGS = Settings(
    model="m",
    layers=(4, 3),
    tasks=("a", "b", "c"),
    detailed=("a",),
    unseen=("a", "b", "c"),
    experiments=tuple(EXPERIMENTS),
    criteria=("ap", "fpp", "rap", "random", "svd"),
    draws=2,
    sizes=(10, 100),
)
SMALL = "--tasks movie --experiments accuracy --criteria ap,random --examples 8 --tested 6 --draws 2 --threads 1"


def test_the_grid_has_each_cell_once() -> None:
    cells = grid(SETTINGS)
    assert len(cells) == len(set(cells))
    alone = 2 * 9
    dense, accuracy = 3, 3 * (1 + 1 + 2 + 2 + 1) * alone
    assert len(grid(replace(SETTINGS, experiments=("accuracy",)))) == dense + accuracy
    counts = Counter(cell.criterion for cell in cells)
    assert counts["ap-unsupervised"] == 3 * alone
    assert counts["rap"] == counts["random"] == 2 * counts["fpp"]
    # Five rates of each stack at once; low-resource; other tasks' scores; three kinds, three depths of two stacks.
    assert counts["ap"] == 3 * alone + 3 * 25 + 2 * 2 * 10 + 2 * alone + (2 + 3 + 3 + 3) * 5


def test_parts_of_a_stack() -> None:
    assert SETTINGS.parts("encoder") == ["ffn", "self", "0-0", "1-2", "3-3"]
    assert SETTINGS.parts("decoder") == ["ffn", "self", "cross", "0-0", "1-1", "2-2"]
    assert replace(SETTINGS, layers=(1, 2)).parts("encoder")[2:] == ["0-0"]


def test_balanced_draws() -> None:
    rows = [{"input": str(i), "target": "rare" if i % 10 == 0 else "abc"[i % 3]} for i in range(100)]
    drawn = balanced(rows, 22, draw=0)
    assert sorted(Counter(row["target"] for row in drawn).values()) == [5, 5, 6, 6]
    assert len({row["input"] for row in drawn}) == 22
    assert balanced(rows, 22, draw=0) == drawn != balanced(rows, 22, draw=1)
    assert Counter(row["target"] for row in balanced(rows, 60, draw=0))["rare"] == 10  # All that there are.
    assert len(balanced(rows, 100, draw=3)) == 100


def test_a_ledger_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Ledger(folder, {"rates": (0.1, 0.2)}) as ledger:
        ledger.add({"cell": 1}, {"value": 0.5})
        ledger.add({"cell": 2}, {"value": 0.25})
        with pytest.raises(InputError, match=r"^out: .* is in use by another process"):
            Ledger(folder, {"rates": (0.1, 0.2)})
    with open(folder / CELLS, "ab") as file:
        file.write(b'["{\\"cell\\": 3}", {"cel')  # Cut off by a kill.
    with Ledger(folder, {"rates": [0.1, 0.2]}) as again:
        assert again.rows() == [{"cell": 1, "value": 0.5}, {"cell": 2, "value": 0.25}]
        assert {"cell": 2} in again
        assert {"cell": 3} not in again
        again.add({"cell": 3}, {"value": 1.0})
    with Ledger(folder, {"rates": [0.1, 0.2]}) as last:
        assert [row["cell"] for row in last.rows()] == [1, 2, 3]


def test_a_ledger_refuses(tmp_path: Path) -> None:
    with Ledger(tmp_path / "run", {"draws": 5}):
        pass
    with pytest.raises(InputError, match=r"^draws: .*run' was begun with 5, got 3"):
        Ledger(tmp_path / "run", {"draws": 3})
    (tmp_path / "run" / CELLS).write_text("no cell\n")
    with pytest.raises(InputError, match=r"^out: .*cells.jsonl' is damaged in line 1; delete this line, and its cell"):
        Ledger(tmp_path / "run", {"draws": 5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"^out: expected a new folder or one that this command began"):
        Ledger(tmp_path / "other", {})
    with pytest.raises(InputError, match=r"^out: expected an existing parent folder"):
        Ledger(tmp_path / "none" / "run", {})


def test_a_killed_run_gives_the_same_table(run: Run, tmp_path: Path) -> None:
    """The run is killed twice, in the middle of its work."""
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "reproduce", "ap", "--out", "killed"]
    for finished in (3, 30):
        process = subprocess.Popen([*command, *SMALL.split(), "--resume"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        cells = tmp_path / "killed" / CELLS
        while process.poll() is None and (not cells.exists() or cells.read_bytes().count(b"\n") < finished):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = (tmp_path / "killed" / CELLS).read_bytes().count(b"\n")
    assert run(f"reproduce ap --out killed {SMALL} --json --resume").code == 0
    whole = run(f"reproduce ap --out whole {SMALL} --json").document
    assert 30 <= before < whole["cells"]
    killed, clean = (json.loads((tmp_path / name / "cells.json").read_text()) for name in ("killed", "whole"))
    for document in (killed, clean):
        for cell in document["cells"]:
            del cell["seconds"]
    assert killed["cells"] == clean["cells"]
    assert killed["claims"] == clean["claims"] == whole["claims"]
    assert (tmp_path / "killed" / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()
    assert (tmp_path / "whole" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "whole" / "cells.csv").read_text().count("\n") == 1 + int(str(whole["cells"]))
    # Finished: nothing runs again.
    stamp = (tmp_path / "whole" / CELLS).read_bytes()
    assert run(f"reproduce ap --out whole {SMALL} --resume").code == 0
    assert (tmp_path / "whole" / CELLS).read_bytes() == stamp


BAD = [
    ("--tasks movies", "tasks: expected some of domain, language, movie, qtype, sentiment, got 'movies'"),
    ("--experiments speed", "experiments: expected some of accuracy, both, low-resource,"),
    ("--criteria ap,best", "criterion: expected one of "),
    ("--preset original", "preset: expected builtin or paper, got 'original'"),
    ("--preset paper --data-root nowhere", "data-root: no such file: 'nowhere/sst2/train'"),
    ("--tasks movie --experiments unseen", "tasks: the experiment on unseen domains needs the tasks sentiment, movie,"),
    ("--sizes 10,x", "sizes: expected numbers between commas, got '10,x'"),
    ("--tasks movie --sizes 5000 --experiments low-resource", "sizes: expected at most 1000, the examples of movie, got 5000"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_input_is_one_line(run: Run, tmp_path: Path, options: str, message: str) -> None:
    result = run(f"reproduce ap --out d {options}")
    assert_refused(result, message, tmp_path / "d")


def local_copies(root: Path) -> None:
    """Write a few rows of each data set, with the Hub's columns; half of the sets as Parquet."""
    import pyarrow
    import pyarrow.parquet

    for number, (name, known) in enumerate(glue.SETS.items()):
        (root / name).mkdir(parents=True)
        for split in ("train", "validation"):
            rows: list[dict[str, Any]] = [
                {**{column: f"{column} {i} of {name}" for column in known.fields}, "label": i % len(known.labels), "idx": i}
                for i in range(12)
            ]
            if number % 2:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / name / f"{split}.parquet")
            else:
                (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_papers_sets_from_local_copies(tmp_path: Path) -> None:
    local_copies(tmp_path)
    rows = glue.examples("qnli", "validation", tmp_path)
    assert rows[1] == {"input": "qnli question: question 1 of qnli sentence: sentence 1 of qnli", "target": "not_entailment"}
    assert {row["target"] for row in glue.examples("cb", "train", tmp_path)} == {"entailment", "contradiction", "neutral"}
    (tmp_path / "rte" / "train.parquet").unlink(missing_ok=True)
    (tmp_path / "rte" / "train.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 7}\n')
    with pytest.raises(InputError, match=r"^rte, train, row 1: expected sentence1, sentence2 and a label below 2, got .*7"):
        glue.examples("rte", "train", tmp_path)
    with pytest.raises(InputError, match=r"^tasks: expected some of sst2, mrpc, boolq, qnli, cb, rte, got 'mnli'"):
        glue.examples("mnli", "train", tmp_path)


def test_the_papers_preset_runs_on_local_copies(run: Run, tmp_path: Path) -> None:
    local_copies(tmp_path / "sets")
    options = "--preset paper --data-root sets --tasks qnli,rte,sst2 --experiments unseen,layers --sizes 4 --json"
    result = run(f"reproduce ap --out d {options}")
    assert result.code == 0
    document = json.loads((tmp_path / "d" / "cells.json").read_text())
    assert document["settings"]["examples"] is None
    assert {(cell["scored"], cell["tested"]) for cell in document["cells"]} >= {("rte", "qnli"), ("sst2", "qnli")}
    assert run(f"reproduce ap --out d --resume {options}").code == 0
    for split in ("train", "validation"):  # The same weights, and a row that has changed.
        (path,) = (tmp_path / "sets" / "rte").glob(f"{split}.*")
        kept, changed = path.rename(tmp_path / "kept"), path.with_name(f"{split}.jsonl")
        rows = [{"sentence1": f"sentence1 {k} of rte", "sentence2": f"sentence2 {k} of rte", "label": k % 2} for k in range(12)]
        rows[3]["sentence2"] = "another"
        changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = run(f"reproduce ap --out d --resume {options}")
        assert result.code == 2
        assert result.errors[-1].startswith("secateur: rows: 'd' was begun with '")
        assert result.errors[-1].endswith("'; the examples have changed: give the former ones, or a new folder")
        changed.unlink()
        kept.rename(path)
    assert run(f"reproduce ap --out d --resume {options}").code == 0


@pytest.mark.slow
def test_the_fine_tuning_script_runs_on_local_copies(tmp_path: Path) -> None:
    from secateur.data import builtin

    local_copies(tmp_path / "sets")
    script = Path(__file__).parents[2] / "examples" / "finetune_t5_glue.py"
    options = ["--model", str(builtin.MODEL), "--data-root", str(tmp_path / "sets"), "--out", str(tmp_path / "out")]
    small = ["--steps", "3", "--batch", "4", "--micro-batch", "2", "--check-every", "2"]
    result = subprocess.run([sys.executable, str(script), *options, *small], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def made_up(decoder: float, encoder: float) -> list[dict[str, Any]]:
    """Invent a run: criteria that are listed earlier lose less, and stacks lose the given shares of the rate."""
    rows = []
    for cell in grid(SETTINGS):
        rank = ("", "ap-unsupervised", *SETTINGS.criteria).index(cell.criterion)
        related = SETTINGS.unseen.index(cell.scored) if cell.scored != cell.tested else 0
        lost = (decoder * cell.decoder + encoder * cell.encoder**3) * (1 + rank + related) + 0.01 * cell.draw
        rows.append({**asdict(cell), "value": 0.9 - lost})
    return rows


def test_claims_that_hold_and_that_do_not() -> None:
    checked = claims_of_paper.claims(Results(made_up(decoder=0.01, encoder=0.5)), SETTINGS)
    assert len(checked) == 6 + 1 + 2 + 1 + 1 + 1 + 2
    assert all(claim.held for claim in checked)
    worse = claims_of_paper.claims(Results(made_up(decoder=-0.3, encoder=-0.1)), SETTINGS)
    assert not any(claim.held for claim in worse if "keeps more" in claim.claim and "p = 0.3" in claim.claim)
    only = replace(SETTINGS, experiments=("unseen",))
    assert len(claims_of_paper.claims(Results(made_up(0.1, 0.1)), only)) == 2


def test_draws_are_averaged_and_figures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(made_up(decoder=0.1, encoder=0.1))
    mean = results.at(scored="a", tested="a", criterion="random", encoder=0.1)
    assert mean is not None
    assert mean.draws == 2
    assert mean.deviation == pytest.approx(0.01 / 2**0.5)
    assert results.at(scored="a", tested="b", criterion="random", encoder=0.1) is None
    assert results.dense("b") == 0.9
    figures = figures_of(monkeypatch, ap_figures)
    drawn = draw(results, SETTINGS, {"device": "CPU (x86_64)"})
    assert set(drawn) == {f"{name}.png" for name in EXPERIMENTS}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    for figure, name in zip(figures, SETTINGS.experiments, strict=True):
        about = ("one draw each",) if name == "both" else ("Error bars: standard deviation over at most 2 draws",)
        assert_readable(figure, (SETTINGS.model, "test examples of each task", "CPU (x86_64)"), about)
        if name == "both":
            maps = [axes.images[0].get_clim() for axes in figure.axes if axes.images]
            assert len(set(maps)) == 1
            assert figure.axes[-1].get_ylabel() == "accuracy"  # Of the colour bar.
        else:
            pairs = zip(figure.axes[::2], figure.axes[1::2], strict=True)
            assert all(left.get_ylim() == right.get_ylim() for left, right in pairs)


def test_claims_are_undecided_where_intervals_overlap() -> None:
    rows = made_up(decoder=0.01, encoder=0.5)
    sure, unsure = ([{**row, "low": row["value"] - half, "high": row["value"] + half} for row in rows] for half in (1e-6, 0.4))
    exact = claims_of_paper.claims(Results(rows), SETTINGS)
    assert {claim.verdict for claim in exact} == {"yes"}
    assert claims_of_paper.claims(Results(sure), SETTINGS) == exact
    doubtful = claims_of_paper.claims(Results(unsure), SETTINGS)
    assert {claim.verdict for claim in doubtful} == {"undecided"}
    assert [claim.ours for claim in doubtful] == [claim.ours for claim in exact]
    assert verdicts(doubtful) == f"0 of {len(exact)} claims held, {len(exact)} undecided"
    text = "\n".join(claims_table(doubtful))
    assert text.count("**undecided**") == len(exact)
    assert "intervals of the compared values overlap" in text
    assert doubtful[0].to_json()["verdict"] == "undecided"


def test_the_intervals_of_sums_and_means() -> None:
    one, other = Estimate(0.8, 0.77, 0.84), Estimate(0.5, 0.46, 0.53)
    difference = combined([(1, one), (-1, other)])
    assert difference.value == pytest.approx(0.3)
    assert difference.low == pytest.approx(0.3 - (0.03**2 + 0.03**2) ** 0.5)
    assert difference.high == pytest.approx(0.3 + (0.04**2 + 0.04**2) ** 0.5)
    mean = averaged([one, other])
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.65, 0.615, 0.685))
    assert (one.overlaps(other), one.overlaps(Estimate(0.9, 0.83, 0.95))) == (False, True)
    exact = Estimate(0.8, 0.8, 0.8)
    assert (exact.overlaps(exact), exact.reaches(0.8), one.reaches(0.78), one.reaches(0.85)) == (False, False, True, False)
