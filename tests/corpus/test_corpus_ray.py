"""Bulk scoring with Ray gives the local engine's output, also where a worker or the driver is killed during the run."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import corpora
import pytest
import torch
from cases import CASES
from PIL import Image

import secateur
from secateur.cli import main
from secateur.cli.commands.score import _Recipe
from secateur.corpus.output import SCORED, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.ray_engine import WorkerError, _Worker, cluster, score_on_ray
from secateur.corpus.shards import Reading
from secateur.corpus.sources import find_sources
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError

BERT = CASES["bert-sequence"]
ROWS = [2000 + 100 * k for k in range(6)]


def command(folder: Path, out: str, *options: str) -> list[str]:
    fixed = ["--threads", "1", "--max-tokens", "64", "--dtype", "float32", "--device", "cpu", "--id-column", "id"]
    return ["secateur", "score", str(folder / "model"), "--data", f"{folder}/data/*.gz", "--out", out, *fixed, *options]


def exit_code(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int | str | None:
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, shards of which one is cut off, and the output of the local engine."""
    folder = tmp_path_factory.mktemp("scored")
    model: Any = BERT.model()
    model.save_pretrained(folder / "model")
    BERT.task.reader.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for k, rows in enumerate(ROWS):
        path = corpora.json_lines(folder / "data", corpora.texts(rows, k), f"{k}.jsonl.gz")
    (folder / "data" / "z.jsonl.gz").write_bytes(path.read_bytes()[:-1000])
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert exit_code(monkeypatch, command(folder, str(folder / "local"))) == 1
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two simulated machines with a CPU each."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'secateur[ray]'")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100_000_000}
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        for folder in (here, here.parent / "support"):  # Workers import functions of this file.
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
        ray_cluster.add_node(num_cpus=1, **memory)
    yield ray_cluster.address
    ray_cluster.shutdown()


def require_same(local_run: Path, out: Path) -> None:
    """Check that all rows are there once, in order and with the same bits, and nothing is half-written."""
    expected, rows = corpora.read(local_run / "local"), corpora.read(out)
    assert len(expected) == len(ROWS)
    assert rows == expected
    assert not list(out.rglob(".*.partial"))


def until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


def half_written(out: Path) -> list[int]:
    """The processes that are writing a shard."""
    return [int(path.name.split(".")[-2].partition("-")[0]) for path in (out / SCORED).glob(".[0-9]*.partial")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray raises warnings.
def test_a_killed_worker_changes_nothing(
    address: str, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, killed = tmp_path / "out", list[int]()

    def kill() -> None:
        (pid, *_) = until(lambda: half_written(out))
        assert Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::")
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    code = exit_code(monkeypatch, command(local_run, str(out), "--engine", "ray", "--ray-address", address, "--json"))
    thread.join()
    assert code == 1
    assert len(killed) == 1
    require_same(local_run, out)
    captured = capsys.readouterr()
    assert captured.out.startswith("{")
    assert f'"rows": {sum(ROWS)}' in captured.out
    assert "z.jsonl.gz: cannot be read to its end" in captured.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_driver_is_resumed(address: str, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = command(local_run, str(out), "--engine", "ray", "--ray-address", address)
    driver = subprocess.Popen([sys.executable, "-m", *arguments])
    until(lambda: list((out / SCORED).glob("*.parquet")))
    driver.kill()
    driver.wait()
    assert not (out / "summary.json").exists()
    assert exit_code(monkeypatch, [*arguments, "--resume", "--workers", "1"]) == 1
    require_same(local_run, out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_parts_of_one_file_are_shared_and_resumed(
    address: str, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers score parts of the one file, and a killed driver loses only the parts at work."""
    corpora.json_lines(tmp_path, corpora.texts(8000), "one.jsonl")
    fixed = ["--threads", "1", "--max-tokens", "64", "--dtype", "float32", "--device", "cpu", "--id-column", "id"]
    line = ["secateur", "score", str(local_run / "model"), "--data", f"{tmp_path}/one.jsonl", "--part-rows", "500", *fixed]
    out, on_ray = tmp_path / "out", ["--engine", "ray", "--ray-address", address]
    driver = subprocess.Popen([sys.executable, "-m", *line, "--out", str(out), *on_ray])
    until(lambda: list((out / SCORED).glob("*.parquet")))
    driver.kill()
    driver.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / SCORED).glob("*.parquet")}
    assert 1 <= len(kept) < 16
    assert exit_code(monkeypatch, [*line, "--out", str(out), *on_ray, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert exit_code(monkeypatch, [*line, "--out", str(tmp_path / "local")]) == 0
    assert corpora.read(out) == corpora.read(tmp_path / "local")
    assert len(corpora.read(out)) == 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert-token", "t5-gated", "vit"])
def test_spans_texts_and_images_are_those_of_the_local_engine(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, open_labels = CASES[name], ["--labels", "open", "--max-new-tokens", "5"] if name == "t5-gated" else []
    secateur.save(case.model(), tmp_path / "m", tokenizer=case.task.reader)
    if name == "vit":
        for k, example in enumerate(case.examples):
            Image.fromarray(example["image"]).save(tmp_path / f"{k}.png")
        corpora.json_lines(tmp_path, [str(tmp_path / f"{k}.png") for k in range(len(case.examples))])
    else:
        corpora.json_lines(tmp_path, corpora.texts(60))
    fixed = ["--threads", "1", "--max-tokens", "64", "--dtype", "float32", "--device", "cpu", "--input-column", "text"]
    line = ["secateur", "score", str(tmp_path / "m"), "--data", f"{tmp_path}/a.jsonl", *fixed, *open_labels]
    on_ray = ["--engine", "ray", "--ray-address", address]
    assert exit_code(monkeypatch, [*line, "--out", str(tmp_path / "ray"), *on_ray]) == 0
    assert exit_code(monkeypatch, [*line, "--out", str(tmp_path / "local"), "--compile", "off"]) == 0
    (rows,) = corpora.read(tmp_path / "ray").values()
    assert len(rows) == (len(case.examples) if name == "vit" else 60)
    assert corpora.read(tmp_path / "ray") == corpora.read(tmp_path / "local")


def fails(error: Exception) -> Runner:
    raise error


FAILURES: list[tuple[Exception, str]] = [(InputError("model: no"), "model: no"), (KeyError("a\nb"), r"KeyError: 'a\nb'")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_workers_error_is_one_line(address: str, local_run: Path, tmp_path: Path) -> None:
    sources, folder = find_sources(f"{local_run}/data/0*"), Folder(str(tmp_path))
    model = Runner(BERT.model(), BERT.task, 64, threads=1)
    for error, line in FAILURES:
        with cluster(address), pytest.raises(InputError if isinstance(error, InputError) else WorkerError) as raised:
            list(score_on_ray(partial(fails, error), 1, model, sources, folder, Reading(), lambda source: {}))
        assert str(raised.value) == line


class MissingModule:
    """A loader whose module does not exist on another machine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("no_such_module",)

    def __call__(self) -> Runner:
        raise NotImplementedError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_cannot_start_says_why(address: str, local_run: Path, tmp_path: Path) -> None:
    model = Runner(BERT.model(), BERT.task, 64, threads=1)
    with cluster(address), pytest.raises(WorkerError) as raised:
        list(
            score_on_ray(
                MissingModule(),
                1,
                model,
                find_sources(f"{local_run}/data/0*"),
                Folder(str(tmp_path)),
                Reading(),
                lambda source: {},
            )
        )
    assert str(raised.value).startswith("Ray: The actor died")
    assert str(raised.value).endswith(": ModuleNotFoundError: No module named 'no_such_module'")
    assert "\n" not in str(raised.value)


def worker(folder: Path, load: Callable[[], Runner]) -> _Worker:
    sources = find_sources(str(corpora.lines(folder, corpora.texts(50))))
    return _Worker(load, 1, sources, Folder(str(folder)), Reading(), lambda source: {})


def test_a_worker_loads_its_model_once_and_counts(tmp_path: Path) -> None:
    loads: list[Runner] = []

    def load() -> Runner:
        loads.append(Runner(BERT.model(), BERT.task, 64, threads=1))
        return loads[-1]

    score_shard = worker(tmp_path, load)
    first, second = score_shard({"item": [0]}), score_shard({"item": [0]})
    assert (first["shard"], first["rows"], first["scored"], first["error"], first["raised"]) == ([0], [50], [50], [""], [""])
    assert len(loads) == 1
    assert first["busy"][0] + second["busy"][0] == pytest.approx(loads[0].busy)


@pytest.mark.parametrize(("error", "line"), FAILURES)
def test_a_worker_returns_its_error(error: Exception, line: str, tmp_path: Path) -> None:
    row = worker(tmp_path, partial(fails, error))({"item": [0]})
    assert (row["raised"], row["input_error"]) == ([line], [isinstance(error, InputError)])
    assert not (tmp_path / SCORED).exists()


def test_two_writers_of_a_shard_do_not_share_a_file(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    one, two = (folder.written_by(name).partial(SCORED, "b/a.parquet") for name in ("1", "2"))
    assert one != two
    for path in (one, two):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    folder.sweep()
    assert not list(tmp_path.rglob("*.partial"))


BAD = {
    "--engine spark": "engine: expected local or ray, got 'spark'",
    "--workers 2": "workers: expected none without --engine ray, got 2",
    "--ray-address auto": "ray-address: expected none without --engine ray, got 'auto'",
    "--engine ray --limit 3": "limit: expected none with --engine ray, whose workers do not know of each other's rows, got 3",
    "--engine ray": "engine: expected Ray to be installed (pip install 'secateur[ray]'), got no Ray",
}


@pytest.mark.parametrize("options", BAD)
def test_unusable_options_are_one_line(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    arguments = ["secateur", "score", "builtin", "--data", "builtin:movie", "--labels", "good,bad", "--out", str(out)]
    assert exit_code(monkeypatch, [*arguments, *options.split()]) == 2
    assert capsys.readouterr().err.splitlines() == [f"secateur: {BAD[options]}"]
    assert not out.exists()


def test_other_weights_than_the_drivers_are_refused() -> None:
    recipe = _Recipe("builtin", None, "good,bad", None, "cpu", "float32")
    tuned = {"max_tokens": 64, "workers": 1, "threads": 1, "dtype": "bfloat16"}
    runner, _ = recipe.make()
    again = recipe.make_again(weights_digest(runner.model), tuned)
    assert (again.max_tokens, again.threads, next(again.model.parameters()).dtype) == (64, 1, torch.bfloat16)
    with pytest.raises(InputError, match="got other weights on"):
        recipe.make_again("0" * 16, tuned)
