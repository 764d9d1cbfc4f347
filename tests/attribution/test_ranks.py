"""Several processes, checkpoints and models on several devices: `attribute` gives the scores of a plain call."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, Case, labelled
from command import Run
from ranks_job import CASE, LARGE, SMALL, attribute
from torch import Tensor

import secateur
import secateur_kernels
from secateur.attribution import checkpoint as partial_sums
from secateur.attribution.attribute import _ScoreSums
from secateur.attribution.criteria import PRESETS, criterion_named
from secateur.attribution.ranks import Ranks
from secateur.model.discovery import fingerprint
from secateur.tasks import Batch

HERE = Path(__file__).parents[1] / "support"
JOB = str(HERE / "ranks_job.py")
# The folders of the imported modules, so that a process finds them from any folder.
PATHS = [HERE, *(Path(package.__path__[0]).parent for package in (secateur, secateur_kernels))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "OMP_NUM_THREADS": "1"}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = "attribute ./model --data rows.jsonl --labels open --max-tokens 12 --per-example --threads 1"


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes of ranks_job.by_ranks have written."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, *LAUNCHER, JOB, "scores", str(folder)]
    subprocess.run(command, env=ENVIRONMENT, timeout=600, check=True, capture_output=True)
    return folder


def close(actual: Tensor, expected: Tensor) -> bool:
    """Tell whether scores are equal up to the order of summation in float64."""
    return bool((actual - expected).abs().max() <= 1e-12 * expected.abs().max())


@pytest.mark.parametrize("max_tokens", [SMALL, LARGE], ids=["several batches", "fewer batches than processes"])
@pytest.mark.parametrize("name", PRESETS)
def test_two_processes_give_the_scores_of_one(by_ranks: Path, name: str, max_tokens: int) -> None:
    expected = attribute(name, max_tokens)
    assert expected.per_example is not None
    for rank in (0, 1):
        actual = secateur.Scores.load(by_ranks / f"{name}-{max_tokens}-{rank}.safetensors")
        assert actual.per_example is not None
        assert list(actual) == list(expected)
        assert (actual.sites, actual.examples, actual.tokens) == (expected.sites, expected.examples, expected.tokens)
        for site in expected:
            assert close(actual[site], expected[site]), site
            assert close(actual.per_example[site], expected.per_example[site]), site
        assert (actual.convergence is None) == (expected.convergence is None)
        if expected.convergence is not None:
            assert actual.convergence is not None
            assert actual.convergence.doubled == pytest.approx(expected.convergence.doubled, rel=1e-12)
            actual_tensors, expected_tensors = actual.convergence.tensors(), expected.convergence.tensors()
            assert all(torch.equal(actual_tensors[key], expected_tensors[key]) for key in expected_tensors)


def test_all_processes_report_the_error_of_one(by_ranks: Path) -> None:
    messages = [json.loads((by_ranks / f"messages-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0][:-1] == messages[1][:-1]
    poisoned, different, unusable, _ = messages[0]
    assert poisoned.startswith("model: activations of site 'encoder.0.self_attention' are not finite (NaN or inf)")
    assert different == "group: expected the same examples in all processes, got another in process 1"
    assert unusable == "examples: expected at least one example, got none"
    assert [of_rank[-1] for of_rank in messages] == [7, 6]  # Without a group, each process has its own examples.


def test_batches_are_dealt_out_evenly() -> None:
    costs = [random.Random(k).randrange(1, 100) for k in range(40)]
    shares = []
    for rank in range(3):
        ranks = Ranks(None)
        ranks.rank, ranks.size = rank, 3
        shares.append(ranks.deal(costs))
    assert sorted(k for share in shares for k in share) == list(range(40))
    loads = [sum(costs[k] for k in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


@pytest.fixture
def files(run: Run) -> Run:
    """The fixture `run`, in a folder with a small model and its examples."""
    secateur.save(CASE.model(), "model", tokenizer=CASE.task.reader)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(LABELS, 40)))
    return run


def kill_in_the_middle(line: str, launcher: list[str]) -> None:
    """Start a command, and kill all its processes at a random moment after the first checkpoint."""
    command = [sys.executable, *launcher, JOB, "command", *line.split()]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(Path("c").glob("process-*")):
        time.sleep(0.005)
    time.sleep(random.SystemRandom().random() / 2)
    process.kill()
    process.wait()
    for path in Path().glob("process-*"):
        if launcher:
            os.kill(int(path.name.removeprefix("process-")), signal.SIGKILL)
    if Path(".killed.lock").exists():
        with open(".killed.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Waits until the last thread of the killed processes has ended.
    assert not Path("killed").exists()


@pytest.mark.parametrize("criterion", ["gradient", "wanda", "ig-joint:nodes=2"])
def test_a_killed_command_continues_to_the_same_bits(files: Run, criterion: str) -> None:
    line = f"{COMMAND} --criterion {criterion} --out"
    assert files(f"{line} whole").code == 0
    kill_in_the_middle(f"{line} killed --checkpoint c", [])
    assert files(f"{line} killed --checkpoint c --resume --json").code == 0
    assert Path("killed").read_bytes() == Path("whole").read_bytes()
    assert not Path("c").exists()


def test_a_process_that_tries_to_write_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / ".run.0123abcd.partial").touch()
    partial_sums.Checkpoint(tmp_path, {}, 1, 2)
    (tmp_path / "run").touch()
    with pytest.raises(secateur.InputError, match=r"^checkpoint: expected a new folder or one of a killed run"):
        partial_sums.Checkpoint(tmp_path, {}, 1, 2)


def test_killed_processes_continue_to_the_same_bits(files: Run) -> None:
    line = f"{COMMAND} --criterion flap --out"
    launch = [sys.executable, *LAUNCHER, "-m", "secateur"]
    kill_in_the_middle(f"{line} killed --checkpoint c", LAUNCHER)
    refused = files(f"{line} killed --checkpoint c --resume")
    assert refused.errors == ["secateur: checkpoint: expected 2 processes, which began 'c', got 1"]
    for options in ("whole", "killed --checkpoint c --resume"):
        done = subprocess.run([*launch, *f"{line} {options} --json".split()], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["examples"] == 40
    assert Path("killed").read_bytes() == Path("whole").read_bytes()
    assert not Path("c").exists()


def test_bad_input_by_processes_is_one_line(files: Run) -> None:
    Path("rows.jsonl").write_text('{"input": "the cat"}\n')
    command = [sys.executable, *LAUNCHER, "-m", "secateur", *f"{COMMAND} --out s".split()]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("secateur: ")]
    assert lines == [
        "secateur: columns: expected the column 'target', got 'input'; name it: --target-column, in Python "
        "columns={'target': ...}"
    ]
    assert "exitcode  : 2 " in done.stderr  # torchrun reports failed processes on stderr too.
    assert not Path("s").exists()


# This program has no imports beyond the command's own, because further imports could hide a thread that is left.
WITH_THREADS = """
import os
from pathlib import Path

from secateur.cli import main

try:
    main()
finally:
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    Path(f"threads-{os.environ['RANK']}").write_text("".join(names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
@pytest.mark.parametrize(("options", "code"), [("", 0), ("--checkpoint other", 1)], ids=["done", "an error in the middle"])
def test_no_thread_of_the_group_is_left(files: Run, options: str, code: int) -> None:
    # Now and then, a thread that is left aborts the process at its end, in place of an exit with 0 or 2.
    Path("other").mkdir()
    Path("other", "thesis.tex").write_text("precious")
    Path("job.py").write_text(WITH_THREADS)
    command = [sys.executable, *LAUNCHER, "job.py", *f"{COMMAND} --out s {options}".split()]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert ("secateur: checkpoint: expected a new folder" in done.stderr) == bool(code)
    for rank in range(2):
        threads = Path(f"threads-{rank}").read_text().split()
        assert "python" in "".join(threads)
        assert not [name for name in threads if "gloo" in name]


class Killed(Exception):
    """Raised in place of a signal."""


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a checkpoint that contains three batches."""
    monkeypatch.setattr(partial_sums, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(partial_sums, "MAX_SHARE", float("inf"))

    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:  # The first call is before the first batch.
            raise Killed

    with pytest.raises(Killed):
        attribute("gradient", SMALL, checkpoint=tmp_path / "c", progress=progress)
    return tmp_path / "c"


def test_a_checkpoint_replaces_the_batches_before_it(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (interrupted / ".process-0-of-1.safetensors.x1").write_text("A partial file that a kill has left.")
    rows: list[list[int]] = []
    add = _ScoreSums.add

    def recorded(sums: _ScoreSums, batch: Batch) -> None:
        rows.append(batch.rows)
        add(sums, batch)

    monkeypatch.setattr(_ScoreSums, "add", recorded)
    expected = attribute("gradient", SMALL)
    all_rows = rows.copy()
    rows.clear()
    actual = attribute("gradient", SMALL, checkpoint=interrupted)
    assert rows == all_rows[3:]
    assert actual.equal(expected)
    assert actual.per_example is not None
    assert expected.per_example is not None
    assert all(torch.equal(actual.per_example[site], expected.per_example[site]) for site in expected)
    assert not interrupted.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": CASE.examples[:-1]}, "was begun with examples '"),
        ({"model": CASE.model(seed=1)}, "was begun with model '"),
        ({"max_tokens": 11}, "was begun with max_tokens 10, got 11"),
        ({"per_example": False}, "was begun with per_example True, got False"),
        ({"criterion": criterion_named("fisher")}, "was begun with criterion {'criterion': 'GradientActivation', "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_attribution_is_refused(interrupted: Path, changes: dict[str, Any], message: str) -> None:
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    arguments = {"model": CASE.model(), "task": CASE.task, "examples": CASE.examples, "max_tokens": SMALL, "per_example": True}
    with pytest.raises(secateur.InputError) as raised:
        secateur.attribute(**{**arguments, **changes}, checkpoint=interrupted)
    assert str(raised.value).startswith(f"checkpoint: '{interrupted}' {message}")
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == before


def test_processes_share_the_fewest_tokens_that_one_of_them_can_hold(by_ranks: Path) -> None:
    scores = [secateur.Scores.load(by_ranks / f"own-{rank}.safetensors") for rank in (0, 1)]
    assert [of_rank.max_tokens for of_rank in scores] == [2 * SMALL] * 2
    assert scores[0].equal(scores[1])


def test_a_continued_call_takes_the_tokens_that_the_checkpoint_was_begun_with(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.attribution.attribute.pass_tokens", lambda *_, **__: LARGE)
    scores = attribute("gradient", None, checkpoint=interrupted)
    assert scores.max_tokens == SMALL
    assert scores.equal(attribute("gradient", SMALL))
    assert attribute("gradient", None, checkpoint=interrupted).max_tokens == LARGE


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "process-0-of-1.safetensors").write_text("no tensors")
    for folder, message in (
        (tmp_path, "checkpoint: expected a new folder or one of a killed run, got "),
        (tmp_path / "thesis.tex", "checkpoint: expected a folder, got the file "),
        (tmp_path / "no" / "c", "checkpoint: expected an existing parent folder, got "),
        (tmp_path / "c", "is damaged; delete its folder to begin anew"),
    ):
        with pytest.raises(secateur.InputError, match=message):
            attribute("gradient", SMALL, checkpoint=folder)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
@pytest.mark.parametrize("case", [CASES[name] for name in ("t5-gated", "bert-sequence", "gemma3")], ids=str)
def test_offloaded_models_have_the_same_scores(case: Case, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    model = case.model()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif where == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    else:
        sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
        places = {name: "disk" if size == max(sizes.values()) else "cpu" for name, size in sizes.items()}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name in PRESETS:
        criterion = criterion_named(name)
        if name.startswith("ig"):
            with pytest.raises(
                secateur.InputError, match=r"criterion: expected a model on one device for integrated gradients \("
            ):
                secateur.attribute(model, case.task, case.examples, criterion=criterion)
            continue
        expected = secateur.attribute(case.model(), case.task, case.examples, criterion=criterion)
        actual = secateur.attribute(model, case.task, case.examples, criterion=criterion, checkpoint=tmp_path / "c")
        # Shortcuts pass over modules with hooks, so sums are rounded otherwise.
        for site, scores in actual.items():
            torch.testing.assert_close(scores, expected[site], rtol=1e-4, atol=1e-6, msg=name)
        assert (actual.weights, actual.all_sites) == (expected.weights, expected.all_sites)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own
    assert all(parameter.requires_grad == before.get(name, True) for name, parameter in model.named_parameters())
    assert fingerprint(model) == fingerprint(case.model())


def test_a_device_map_from_the_command_line(files: Run) -> None:
    pytest.importorskip("accelerate")
    assert files(f"{COMMAND} --out plain").code == 0
    assert files(f"{COMMAND} --out mapped --device-map auto").code == 0
    assert Path("plain").read_bytes() == Path("mapped").read_bytes()
    for options, message in (
        ("--device-map odd", "device-map: expected one of auto, balanced, balanced_low_0, sequential, got 'odd'"),
        ("--device-map auto --device cpu", "device-map: expected it alone, got it with device 'cpu'"),
    ):
        refused = files(f"{COMMAND} --out s {options}")
        assert (refused.code, refused.errors) == (2, [f"secateur: {message}"])
