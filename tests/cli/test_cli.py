"""The command line on the built-in model: every command, its files, its JSON, and exit code 2 with one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run, assert_refused
from safetensors import safe_open

import secateur
from secateur.attribution.criteria import PRESETS, criterion_named
from secateur.data import builtin


def test_each_step_alone(run: Run) -> None:
    assert run("attribute builtin --data train.jsonl --out s.safetensors").code == 0
    assert run("plan s.safetensors --keep 0.5 --align 16 --out p.json").code == 0
    pruned = run("prune builtin --data train.jsonl --plan p.json --out d --batch-sizes 2 --lengths 8 --json")
    assert pruned.code == 0
    assert pruned.document["verification"]["holds"] is True
    evaluated = run("evaluate d --data test.jsonl --json").document
    assert evaluated["metric"] == "accuracy"
    assert evaluated["examples"] == 48
    benched = run("benchmark builtin d --batch-sizes 2,4 --lengths 8 --pairs 3 --out b --json").document
    assert len(benched["timings"]) == 2
    assert benched["pruned_parameters"] < benched["dense_parameters"]
    assert Path("b/benchmark.png").read_bytes().startswith(b"\x89PNG")
    # The folder remembers the two labels of its 48 rows, so a single row can be evaluated too.
    assert json.loads(Path("d/secateur.json").read_text())["labels"] == ["bad", "good"]


def test_prune_recovers(run: Run) -> None:
    common = "prune builtin --data train.jsonl --eval test.jsonl --keep 0.4 --batch-sizes 1 --lengths 8 --recover least-squares"
    result = run(f"{common} --out d --json")
    assert result.code == 0
    refits = result.document["recovery"]
    assert isinstance(refits, list)
    assert len(refits) == 17
    # What earlier branches have lost is part of a branch's error, and few examples give little of it back.
    assert sum(refit["after"] for refit in refits) < 0.85 * sum(refit["before"] for refit in refits)
    # The model that was evaluated is the one that was written, in its stored dtype.
    evaluated = run("evaluate d --data test.jsonl --json").document
    assert evaluated["value"] == result.document["evaluation"]["pruned"]["value"]
    unlabeled = run(f"{common} --unlabeled --labels bad,good --out u")
    assert unlabeled.code == 0
    assert "recovery: the branches' outputs were " in unlabeled.out
    for method, message in (
        ("bias", "method: expected least_squares for T5For"),
        ("best", "recover: expected one of least-squares, scale, bias, none, auto, "),
    ):
        refused = run(f"{common.removesuffix(' --recover least-squares')} --recover {method} --out n")
        assert refused.code == 2
        assert refused.errors[-1].startswith(f"secateur: {message}")
        assert not Path("n").exists()


def test_a_backend_is_named(run: Run) -> None:
    assert run("attribute builtin --data train.jsonl --out s.safetensors --backend reference").code == 0
    result = run("attribute builtin --data train.jsonl --out t.safetensors --backend cuda")
    assert result.code == 2
    assert result.errors[-1] == "secateur: backend: expected one of 'auto', 'reference', 'triton', got 'cuda'"
    assert not Path("t.safetensors").exists()


def test_prune_is_the_library_step_by_step(run: Run) -> None:
    common = "--keep 0.6 --effort low --recover least-squares --batch-sizes 1 --lengths 8 --json"
    result = run(f"prune builtin --data train.jsonl --eval test.jsonl --out d {common}")
    assert result.code == 0
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=["bad", "good"])
    plan = secateur.plan(secateur.attribute(model, task, "train.jsonl"), keep=0.6, align=16)
    assert {k: v.tolist() for k, v in secateur.Plan.load("d/plan.json").items()} == {k: v.tolist() for k, v in plan.items()}
    pruned = secateur.prune(model, plan)
    secateur.recover_(model, pruned, task, "train.jsonl")
    evaluation = secateur.evaluate(pruned.half().float(), task, "test.jsonl")  # The stored dtype is float16.
    assert result.document["evaluation"]["pruned"] == evaluation.to_json()
    assert json.loads(Path("d/report.json").read_text()) == result.document


@pytest.mark.parametrize(
    "options", ["--unit channel", "--unit channel --per-head", "--sites encoder.ffn", "--sites decoder.cross"]
)
def test_prune_units_and_sites(run: Run, options: str) -> None:
    line = f"prune builtin --data train.jsonl --examples 16 --keep 0.5 --out d --batch-sizes 1 --lengths 8 --json {options}"
    result = run(line)
    assert result.code == 0
    assert result.document["verification"]["holds"] is True
    dense, pruned = result.document["parameters"].values()
    assert pruned < dense


def test_stored_dtype_is_kept(run: Run) -> None:
    run("prune builtin --data train.jsonl --examples 16 --keep 0.5 --out d --batch-sizes 1 --lengths 8")
    # Read from the file, because transformers widens some of T5's float16 weights when it loads them.
    with safe_open("d/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_sweep(run: Run) -> None:
    line = "sweep builtin --data train.jsonl --eval test.jsonl --keeps 0.8,0.4 --out w --batch-size 2 --length 8 --json"
    result = run(line)
    assert result.code == 0
    assert [point["keep"] for point in result.document["points"]] == [1.0, 0.8, 0.4]
    assert Path("w/sweep.csv").read_text().count("\n") == 4
    dense_ms = result.document["points"][0]["latency_ms"]
    assert all(point["latency_ms"] * point["speedup"] == pytest.approx(dense_ms) for point in result.document["points"])
    about = {"data": "train.jsonl", "eval": "test.jsonl", "unit": "head", "recovery": "least-squares", "task": "text-to-text"}
    assert {name: result.document[name] for name in about} == about
    assert result.document["batch"] == {"size": 2, "tokens": 8}
    assert result.document["environment"]["threads"] == 1
    assert result.document == {**json.loads(Path("w/sweep.json").read_text()), "out": "w"}
    assert sorted(path.name for path in Path("w").iterdir()) == [
        "run.yaml",
        "scores.safetensors",
        "sweep.csv",
        "sweep.json",
        "sweep.png",
    ]


def test_sweep_over_flops_and_speedups(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = "sweep builtin --data train.jsonl --eval test.jsonl --batch-size 2 --length 8 --json"
    for options, kind, amount in (("--flops 0.7 --allocation knapsack", "flops", 0.7), ("--speedup 1.1", "speedup", 1.1)):
        points = run(f"{line} {options} --out {kind}").document["points"]
        assert [(point["budget"], point["amount"]) for point in points] == [(kind, 1.0), (kind, amount)]
    refused = run(f"{line} --keeps 0.5 --flops 0.5 --out both")
    assert_refused(refused, "budget: expected exactly one of keeps, flops, speedup, got keeps, flops", "both")


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out.strip()) == (0, secateur.__version__)


def test_open_targets(run: Run) -> None:
    result = run("evaluate builtin --data builtin:question --examples 8 --json")
    assert result.document["metric"] == "exact match"


def test_sites(run: Run) -> None:
    names = [site["name"] for site in run("sites builtin --sites decoder.cross,encoder.ffn.0-1 --json").document["sites"]]
    assert names == [
        "encoder.0.ffn",
        "encoder.1.ffn",
        "decoder.0.cross_attention",
        "decoder.1.cross_attention",
        "decoder.2.cross_attention",
    ]


@pytest.mark.slow
def test_demo(run: Run) -> None:
    result = run("demo --out demo --json")
    assert result.code == 0
    assert result.document["sweep"][0]["keep"] == 1.0
    assert result.document["pruned"]["verification"]["holds"] is True
    assert Path("demo/sweep.png").exists()
    assert sum(p.numel() for p in secateur.load("demo/model").parameters()) == result.document["pruned"]["parameters"]["pruned"]


def test_criteria(run: Run) -> None:
    criteria = {criterion["name"]: criterion for criterion in run("criteria --json").document["criteria"]}
    assert list(criteria) == list(PRESETS)
    assert criteria["rap"]["settings"] == {"target": "probability", "over_examples": "signed", "labels": "given", "seed": 0}
    assert criteria["wanda"]["settings"] == {}
    assert all(name in run("criteria").out for name in PRESETS)


@pytest.mark.parametrize(
    "criterion", ["fpp", "rap:seed=3", "random:seed=3", "magnitude", "wanda", "flap", "fisher", "owen:seed=3"]
)
def test_attribute_by_each_criterion(run: Run, criterion: str) -> None:
    result = run(f"attribute builtin --data train.jsonl --examples 8 --unit channel --criterion {criterion} --out s --json")
    assert result.code == 0
    assert result.document["criterion"] == criterion_named(criterion).to_json()
    scores = secateur.Scores.load("s")
    assert result.document["examples"] == scores.examples == 8
    assert result.document.get("relative_error") == scores.relative_error()
    assert (scores.standard_errors is not None) == criterion.startswith("owen")


def test_unlabeled(run: Run) -> None:
    """With inputs only, scores are those of every label, and the pruned folder is verified on inputs too."""
    rows = [{"input": row["input"]} for row in builtin.examples("movie")[:10]]
    Path("inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--data inputs.jsonl --unlabeled --labels good,bad"
    scored = run(f"attribute builtin {options} --criterion ap --out s --json")
    assert scored.document["criterion"] == criterion_named("ap-unsupervised").to_json()
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=["good", "bad"])
    expected = secateur.attribute(model, task, rows, criterion=criterion_named("ap-unsupervised"))
    assert secateur.Scores.load("s").equal(expected)
    pruned = run(f"prune builtin {options} --eval test.jsonl --keep 0.6 --out d --batch-sizes 1 --lengths 8 --json").document
    assert pruned["verification"]["holds"] is True
    assert pruned["evaluation"]["pruned"]["examples"] == 48
    swept = run(f"sweep builtin {options} --eval test.jsonl --keeps 0.6 --out w --batch-size 1 --length 8 --json").document
    assert swept["criterion"] == {**scored.document["criterion"], "target": "log_probability"}


def test_ten_examples_know_all_labels_of_the_data(run: Run) -> None:
    """The first ten examples have seven of the eight languages, too many for closed targets by themselves."""
    options = "--data builtin:language --examples 10 --eval test.jsonl --keep 0.8 --out d --batch-sizes 1 --lengths 8 --json"
    held_out = builtin.examples("language.test")[:48]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    evaluated = run(f"prune builtin {options}").document["evaluation"]["pruned"]
    assert (evaluated["metric"], evaluated["examples"]) == ("accuracy", 48)


BAD = {
    "target of a criterion without": (
        "attribute builtin --data train.jsonl --out s --criterion magnitude --target margin",
        "target: expected a criterion with the setting 'target', such as gradient, got 'magnitude'",
    ),
    "sum of a criterion without": (
        "sweep builtin --data train.jsonl --eval test.jsonl --out w --criterion wanda --over-examples signed",
        "over-examples: expected a criterion with the setting 'over_examples', such as gradient, got 'wanda'",
    ),
    "unlabeled with a criterion without": (
        "prune builtin --data train.jsonl --keep 0.5 --out d --criterion fpp --unlabeled --labels good,bad",
        "unlabeled: expected a criterion with the setting 'labels', such as gradient, got 'fpp'",
    ),
    "unlabeled without labels": (
        "attribute builtin --data train.jsonl --out s --unlabeled",
        "labels: expected the candidate labels between commas where examples have no targets, got 'auto'",
    ),
    "unlabeled with open targets": (
        "attribute builtin --data train.jsonl --out s --unlabeled --labels open",
        "labels: expected the candidate labels of a closed task, got None",
    ),
    "criterion's setting": (
        "attribute builtin --data train.jsonl --out s --criterion random:seed=-1",
        "seed: expected a number of at least 0, got -1",
    ),
    "unknown verb": ("frob", "No such command 'frob'"),
    "missing option": ("evaluate builtin", "Missing option '--data'"),
    "no such folder": ("evaluate ./nothing --data test.jsonl", "model: no such model folder: './nothing'"),
    "no such file": ("evaluate builtin --data nope.jsonl", "data: no such file: 'nope.jsonl'"),
    "a folder as data": ("evaluate builtin --data .", "data: expected a file, got the folder '.'"),
    "no such built-in task": ("evaluate builtin --data builtin:frob", "data: expected builtin:TASK"),
    "empty file": ("evaluate builtin --data empty.jsonl", "expected at least one example, got none"),
    "missing column": ("evaluate builtin --data column.jsonl", "columns: expected the column 'target', got 'input'; name it"),
    "null": ("attribute builtin --data null.jsonl --out s", "row 2: expected a value in column 'input', got null"),
    "not text": ("attribute builtin --data number.jsonl --out s", "row 2: expected text in column 'input', got int 7"),
    "not JSON": ("evaluate builtin --data broken.jsonl", "line 2 is not JSON"),
    "one label": ("prune builtin --data one.jsonl --keep 0.5 --out d", "expected at least two different targets, got 'good'"),
    "target outside": (
        "evaluate builtin --data test.jsonl --labels fine,dull",
        "expected a target among the labels 'fine', 'dull'",
    ),
    "keep": ("prune builtin --data train.jsonl --keep 1.5 --out d", "keep: expected a number in (0, 1], got 1.5"),
    "no budget": (
        "prune builtin --data train.jsonl --out d",
        "budget: expected exactly one of keep, flops, params, memory, speedup, latency, got none",
    ),
    "budget out of reach": ("prune builtin --data train.jsonl --flops 0.001 --out d", "flops: expected at least"),
    "output exists": ("prune builtin --data train.jsonl --keep 0.5 --out full", "'full', which exists"),
    "no parent": ("prune builtin --data train.jsonl --keep 0.5 --out no/d", "expected an existing parent folder"),
    "criterion": (
        "prune builtin --data train.jsonl --keep 0.5 --out d --criterion frob",
        "criterion: expected one of gradient",
    ),
    "target": ("attribute builtin --data train.jsonl --out s --target frob", "target: expected one of probability"),
    "unit": ("prune builtin --data train.jsonl --keep 0.5 --out d --unit frob", "unit: expected head or channel, got 'frob'"),
    "sites": ("prune builtin --data train.jsonl --keep 0.5 --out d --sites frob", "sites: expected words of encoder"),
    "no site": ("sites builtin --sites encoder.cross", "selects none of the model's"),
    "device": ("evaluate builtin --data test.jsonl --device frob", "device: 'frob' cannot be used"),
    "dtype": ("evaluate builtin --data test.jsonl --dtype int8", "dtype: expected auto, float32, float16 or bfloat16"),
    "not scores": ("plan train.jsonl --keep 0.5 --out p", "scores: 'train.jsonl' is not a scores file"),
    **{
        f"{option} of a plan": (
            f"prune builtin --data train.jsonl --plan p --out d --{option} {value}",
            f"{option}: expected none with --plan, where it has no effect, got ",
        )
        for option, value in {
            "criterion": "ig",
            "target": "margin",
            "over-examples": "signed",
            "sites": "ffn",
            "unit": "channel",
            "rounds": "2",
            "allocation": "uniform",
            "floor": "0.1",
            "align": "8",
            "per-head": "",
        }.items()
    },
    "target without a criterion": (
        "layers builtin --data train.jsonl --keep-layers 4 --out d --target margin",
        "target: expected none with criterion 'influence', which explains no target, got 'margin'",
    ),
    "rate of frozen weights": (
        "layer-gates builtin --data train.jsonl --keep-layers 4 --out d --frozen --learning-rate 0.1",
        "learning-rate: expected none with --frozen, where it has no effect, got 0.1",
    ),
    "resume of nothing": (
        "attribute builtin --data train.jsonl --out d --resume",
        "resume: expected none without --checkpoint, where it has no effect, got True",
    ),
    **{
        f"root of the built-in data of {name}": (
            f"reproduce {name} --out d --data-root .",
            "data-root: expected none with --preset builtin, where it has no effect, got ",
        )
        for name in ("ap", "multitask")
    },
    "not a plan": ("prune builtin --data train.jsonl --plan train.jsonl --out d", "plan: 'train.jsonl' is not a plan file"),
    "plan and budget": (
        "prune builtin --data train.jsonl --plan p --keep 0.5 --out d",
        "expected --plan or a budget, got both",
    ),
    "sizes": ("bench builtin builtin --batch-sizes 0", "batch-sizes: expected positive numbers, got '0'"),
    "align": ("prune builtin --data train.jsonl --keep 0.5 --align x --out d", "align: expected 'auto' or a positive number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, name: str) -> None:
    line, message = BAD[name]
    good = {"input": "movie review: fine", "target": "good"}
    files: dict[str, list[dict[str, Any]]] = {
        "empty": [],
        "column": [{"input": "x"}],
        "null": [good, {"input": None, "target": "bad"}],
        "number": [good, {"input": 7, "target": "bad"}],
        "one": [good, good, good],
    }
    for file, rows in files.items():
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("broken.jsonl").write_text(json.dumps(good) + "\n{\n")
    Path("full").mkdir()
    before = sorted(str(path) for path in Path().rglob("*"))
    result = run(line)
    assert result.code == 2
    assert message in result.errors[-1]
    assert result.errors[-1].startswith("secateur: ")
    assert not any("Traceback" in error for error in result.errors)
    assert sorted(str(path) for path in Path().rglob("*")) == before, "something was left behind"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: writing the weights fails in the middle."""
    line = "secateur prune builtin --data builtin:movie --examples 16 --keep 0.5 --out d --batch-sizes 1 --lengths 8"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        f"sys.argv = {line.split()!r};"
        "from secateur.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_prune_reports_its_choice_and_the_reason(run: Run) -> None:
    shape = "--batch-sizes 1 --lengths 8 --threads 1"
    result = run(f"prune builtin --data train.jsonl --flops 0.5 --rounds 2 --effort low --out d {shape}")
    assert result.code == 0
    picked = next(line for line in result.out.splitlines() if line.startswith("picked as the closest"))
    assert "nats from the dense model" in picked
    report = json.loads(Path("d/report.json").read_text())
    tried = report["candidates"]
    assert len(tried) == 6  # Four allocations, and two more recoveries of the best one.
    assert [attempt["divergence"] for attempt in tried] == sorted(attempt["divergence"] for attempt in tried)
    assert report["plan"] == tried[0]["plan"]
    assert report["plan"]["remaining"]["flops"] <= 0.5
    assert Path("d/widths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("units", ["--unit head", "--unit channel --sites encoder.ffn,decoder.cross"])
def test_prune_by_measured_speed(run: Run, monkeypatch: pytest.MonkeyPatch, units: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    common = f"prune builtin --data train.jsonl --batch-sizes 1,2 --lengths 8 --threads 1 --recover none --out d {units}"
    slow = run(f"{common} --speedup 500")
    assert slow.code == 2
    assert slow.errors[-1].startswith("secateur: speedup: expected at most ")
    assert not Path("d").exists()
    assert len(list(Path("cache/secateur/latency").iterdir())) == 1
    # The machine decides whether a speed-up is delivered. The output is the measured one, or why nothing was written.
    result = run(f"{common} --speedup 1.3 --json")
    assert result.code in (0, 2)
    if result.code == 0:
        met = json.loads(Path("d/report.json").read_text())["met"]
        assert met["timing"]["batch_size"] == 2
        assert abs(met["timing"]["speedup"] / 1.3 - 1) < 0.031
    else:
        assert "speedup: expected" in result.errors[-1]
        assert not Path("d").exists()


def test_rounds_need_a_share(run: Run) -> None:
    result = run("prune builtin --data train.jsonl --latency 5 --rounds 2 --out d")
    assert result.code == 2
    assert result.errors[-1].startswith("secateur: rounds: expected 1 with a latency")
